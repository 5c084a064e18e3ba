package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/mod/sumdb/note"
)

// bench collects the rows.
type bench struct {
	ctx     context.Context
	window  time.Duration
	callers int
	rows    []row

	crypto, log float64 // floors: signings/s
}

// rate runs work from many callers until the window is over and returns how often
// it succeeded in a second, with the latencies in order.
func (b *bench) rate(callers int, work func(caller, i int) error) (perSecond float64, latencies []time.Duration, err error) {
	var (
		mu    sync.Mutex
		wg    sync.WaitGroup
		stop  atomic.Bool
		first error
	)
	start := time.Now()
	for c := range callers {
		wg.Go(func() {
			var mine []time.Duration
			for i := 0; !stop.Load() && time.Since(start) < b.window && b.ctx.Err() == nil; i++ {
				t := time.Now()
				if err := work(c, i); err != nil {
					stop.Store(true)
					mu.Lock()
					defer mu.Unlock()
					first = err
					return
				}
				mine = append(mine, time.Since(t))
			}
			mu.Lock()
			defer mu.Unlock()
			latencies = append(latencies, mine...)
		})
	}
	wg.Wait()
	took := time.Since(start)
	if first == nil {
		first = b.ctx.Err()
	}
	slices.Sort(latencies)
	return float64(len(latencies)) / took.Seconds(), latencies, first
}

func percentile(sorted []time.Duration, p float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return float64(sorted[int(p*float64(len(sorted)-1))].Microseconds()) / 1000
}

// floors measures the raw cryptography of one signing with a certificate, and the
// raw log with its three entries.
func (b *bench) floors() error {
	digest := sha256.Sum256([]byte("floor"))
	// One signing is a key, eight signatures (precertificate, its log entry, SCT,
	// certificate, two statements, two timestamps) and two verifications.
	var err error
	b.crypto, _, err = b.rate(2, func(int, int) error {
		fresh, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		for i := range 8 {
			sig, err := ecdsa.SignASN1(rand.Reader, fresh, digest[:])
			if err != nil {
				return err
			}
			if i < 2 && !ecdsa.VerifyASN1(&fresh.PublicKey, digest[:], sig) {
				return fmt.Errorf("signature of our own does not verify")
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	b.add(row{Name: "floor: raw cryptography of a signing", Value: b.crypto, Unit: "/s"})
	b.log, err = b.rawLog()
	if err != nil {
		return err
	}
	b.add(row{Name: "floor: raw log, three entries a signing", Value: b.log, Unit: "/s"})
	return nil
}

// rawLog measures Tessera alone, with the service's settings and entry sizes.
func (b *bench) rawLog() (float64, error) {
	dir, err := os.MkdirTemp("", "hallmark-bench-log-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	ctx, stop := context.WithCancel(b.ctx)
	defer stop() // Tessera publishes until its context ends
	secret, _, err := note.GenerateKey(rand.Reader, "bench.example.com")
	if err != nil {
		return 0, err
	}
	signer, err := note.NewSigner(secret)
	if err != nil {
		return 0, err
	}
	driver, err := posix.New(ctx, posix.Config{Path: filepath.Join(dir, "log")})
	if err != nil {
		return 0, err
	}
	appender, shutdown, reader, err := tessera.NewAppender(ctx, driver, tessera.NewAppendOptions().
		WithCheckpointSigner(signer).WithBatching(256, 10*time.Millisecond).WithCheckpointInterval(100*time.Millisecond))
	if err != nil {
		return 0, err
	}
	await := tessera.NewPublicationAwaiter(ctx, reader.ReadCheckpoint, 10*time.Millisecond)
	body := strings.Repeat("x", 2600)
	var n atomic.Int64
	perSecond, _, err := b.rate(b.callers, func(int, int) error {
		var last tessera.IndexFuture
		for range 3 {
			last = appender.Add(ctx, tessera.NewEntry([]byte(body+strconv.FormatInt(n.Add(1), 10))))
		}
		_, _, err := await.Await(ctx, last)
		return err
	})
	if e := shutdown(ctx); err == nil {
		err = e
	}
	return perSecond, err
}

// diskBytes returns what a folder holds, without the partial tiles and bundles that
// a full one has replaced: the log removes those once a minute.
func diskBytes(dir string) (total int64, err error) {
	err = filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if full, partial := strings.CutSuffix(path, ".p"); partial && entry.IsDir() {
			if _, err := os.Stat(full); err == nil {
				return filepath.SkipDir
			}
		}
		info, err := entry.Info()
		if err == nil && info.Mode().IsRegular() {
			total += info.Size()
		}
		return err
	})
	return total, err
}

// residentMiB returns the resident set of this process, in MiB.
func residentMiB() float64 {
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	pages, err := strconv.ParseFloat(strings.Fields(string(text))[1], 64)
	if err != nil {
		return 0
	}
	return pages * float64(os.Getpagesize()) / (1 << 20)
}
