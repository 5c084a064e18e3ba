// Command bench measures what the service does on this machine and prints each
// figure beside its floor from the same run: the raw cryptography and the raw log
// without anything around them. A ratio says more than a rate, for machines
// differ. It writes the figures to a JSON file as well and judges nothing.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/pprof"
	"time"
)

// row is one measured figure.
type row struct {
	Name    string  `json:"name"`
	Value   float64 `json:"value"`
	Unit    string  `json:"unit"`
	Reach   string  `json:"reach,omitempty"` // what the design asks for
	Floor   float64 `json:"floor,omitempty"`
	FloorIs string  `json:"floor_is,omitempty"`
}

func main() {
	var (
		out     = flag.String("out", "bench.json", "file for the figures")
		seconds = flag.Int("seconds", 5, "how long each rate is measured")
		callers = flag.Int("callers", 256, "concurrent callers")
	)
	profile := flag.String("cpuprofile", "", "file for a CPU profile of the whole run")
	image := flag.String("prove", "", "only prove the base of this image and print what that took")
	base := flag.String("base", "", "with -prove: the base")
	flag.Parse()
	if *image != "" {
		if err := prove(context.Background(), *image, *base, os.Stdout); err != nil {
			fmt.Fprintf(os.Stderr, "bench: %v\n", err)
			os.Exit(1)
		}
		return
	}
	if *profile != "" {
		f, err := os.Create(*profile)
		if err == nil {
			err = pprof.StartCPUProfile(f)
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "bench: %v\n", err)
			os.Exit(1)
		}
		defer pprof.StopCPUProfile()
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	b := &bench{ctx: ctx, window: time.Duration(*seconds) * time.Second, callers: *callers}
	if err := b.run(); err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
	text, err := json.MarshalIndent(map[string]any{
		"cores": runtime.NumCPU(), "go": runtime.Version(), "seconds": *seconds, "callers": *callers, "rows": b.rows,
	}, "", "  ")
	if err == nil {
		err = os.WriteFile(*out, append(text, '\n'), 0o644)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
	fmt.Printf("\nwritten to %s\n", *out)
}

func (b *bench) add(r row) {
	b.rows = append(b.rows, r)
	fmt.Printf("%-58s %10.1f %-8s", r.Name, r.Value, r.Unit)
	if r.Reach != "" {
		fmt.Printf("  reach %-14s", r.Reach)
	}
	if r.Floor > 0 {
		fmt.Printf("  %.0f%% of %.0f (%s)", 100*r.Value/r.Floor, r.Floor, r.FloorIs)
	}
	fmt.Println()
}
