package main

import (
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"hallmarkd": main})
}

// TestScripts runs testdata/*.txtar, which read as documentation.
func TestScripts(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { taken.Close() }) // the scripts run after this function has returned
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("TAKEN", taken.Addr().String())
			return nil
		},
	})
}

// The configuration in the examples must be one that the server takes.
func TestExampleConfiguration(t *testing.T) {
	c, err := loadConfig(filepath.Join("..", "..", "examples", "config", "hallmarkd.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Issuers) == 0 || len(c.Registries) == 0 || c.Policy == "" {
		t.Fatalf("the example configures nothing: %+v", c)
	}
	if _, err := os.Stat(c.Policy); err != nil {
		t.Fatal(err)
	}
}

// What is recorded of the configuration names who is believed, and no secret file.
func TestRecordedConfiguration(t *testing.T) {
	c, err := loadConfig(filepath.Join("..", "..", "examples", "config", "hallmarkd.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	first, err := c.recorded()
	if err != nil {
		t.Fatal(err)
	}
	again, err := c.recorded()
	if err != nil || string(first) != string(again) {
		t.Fatalf("two readings differ: %v\n%s\n%s", err, first, again)
	}
	c.Issuers[0].Owners = append(c.Issuers[0].Owners, "4711")
	changed, err := c.recorded()
	if err != nil || string(first) == string(changed) {
		t.Fatalf("another owner is believed and the record is the same: %v", err)
	}
}
