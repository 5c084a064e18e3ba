package main

import (
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Which bases are followed is recorded with the rest, and nothing is followed
// unless the key is there.
func TestFollowedBasesOfTheConfiguration(t *testing.T) {
	c, err := loadConfig(filepath.Join("..", "..", "examples", "config", "hallmarkd.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	bases, err := c.bases()
	if err != nil || len(bases.Follow) == 0 || bases.Every != time.Hour {
		t.Errorf("the example follows %v: %v", bases, err)
	}
	text, err := c.recorded()
	if err != nil || !strings.Contains(string(text), `"bases":{"follow":["`+bases.Follow[0].String()+`"]}`) {
		t.Errorf("recorded: %s %v", text, err)
	}
	c.Bases = nil
	if bases, err = c.bases(); err != nil || bases.Follow != nil || bases.Every != 0 {
		t.Errorf("without the key: %v %v", bases, err)
	}
	if text, err = c.recorded(); err != nil || strings.Contains(string(text), "bases") {
		t.Errorf("without the key: %s %v", text, err)
	}
}
