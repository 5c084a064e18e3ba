package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf16"
	"unicode/utf8"
)

// result is what a command answers, in every form in which it can be printed.
type result struct {
	title string // heading of a job summary
	lines []line
	link  string // page about it; "" is none
	data  any    // marshalled for --output json
}

// line is one line of a result for people. text holds no control character.
type line struct {
	tone tone // of the first word
	text string
}

// tone says how the first word of a line is coloured on a terminal.
type tone int

const (
	neutral tone = iota
	good
	bad
	warned
)

// ANSI colours of the tones.
var colours = map[tone]string{good: "\x1b[32m", bad: "\x1b[31m", warned: "\x1b[33m"}

// add appends a line. Everything in it is escaped, so that no name or message
// from a server or token can start a line, move the cursor or reverse the text
// (attacks J04).
func (r *result) add(format string, args ...any) { r.mark(neutral, format, args...) }

func (r *result) mark(t tone, format string, args ...any) {
	r.lines = append(r.lines, line{t, strings.TrimRight(plain(fmt.Sprintf(format, args...)), " ")})
}

// plain escapes what is not printable, as Go does in string literals: control
// characters, line breaks, characters without width and those that change the
// direction of text.
func plain(s string) string {
	var b strings.Builder
	for _, r := range s {
		if strconv.IsPrint(r) && r != utf8.RuneError {
			b.WriteRune(r)
			continue
		}
		q := strconv.QuoteRuneToASCII(r)
		b.WriteString(q[1 : len(q)-1])
	}
	return b.String()
}

// print writes a result to standard output in the form that was asked for.
func (a *app) print(r result) error {
	switch a.Output {
	case "json":
		raw, err := encodeJSON(r.data)
		if err != nil {
			return err
		}
		return a.write(raw)
	case "md":
		doc := r.markdown()
		if path := a.getenv("GITHUB_STEP_SUMMARY"); path != "" {
			if err := appendFile(path, doc); err != nil {
				return fmt.Errorf("adding to the job summary: %w", err)
			}
		}
		return a.write(doc)
	}
	return a.write(r.text(a.stdoutTerminal && a.getenv("NO_COLOR") == "" && a.getenv("TERM") != "dumb"))
}

// encodeJSON renders a result for programs. What is not printable is escaped here
// too, because people read it on terminals; the values stay the same.
func encodeJSON(data any) ([]byte, error) {
	var raw bytes.Buffer
	enc := json.NewEncoder(&raw)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(data); err != nil {
		return nil, fmt.Errorf("writing the result as JSON: %w", err)
	}
	var b bytes.Buffer
	for _, r := range raw.String() {
		if strconv.IsPrint(r) || r == '\n' {
			b.WriteRune(r)
			continue
		}
		for _, unit := range utf16.Encode([]rune{r}) {
			fmt.Fprintf(&b, `\u%04x`, unit)
		}
	}
	return b.Bytes(), nil
}

// write hands the result out; a full disk or a closed pipe is a failure.
func (a *app) write(b []byte) error {
	if _, err := a.stdout.Write(b); err != nil {
		return fmt.Errorf("writing the result: %w", err)
	}
	return nil
}

func (r result) text(colour bool) []byte {
	var b bytes.Buffer
	for _, l := range r.lines {
		c := colours[l.tone]
		if !colour || c == "" {
			b.WriteString(l.text + "\n")
			continue
		}
		indent := len(l.text) - len(strings.TrimLeft(l.text, " "))
		end := len(l.text)
		if i := strings.IndexByte(l.text[indent:], ' '); i >= 0 {
			end = indent + i
		}
		b.WriteString(l.text[:indent] + c + l.text[indent:end] + "\x1b[0m" + l.text[end:] + "\n")
	}
	return b.Bytes()
}

// markdown shows the same text in a code block, in which nothing of it is
// markup, with a fence that the text cannot close.
func (r result) markdown() []byte {
	text := r.text(false)
	fence := "```"
	for bytes.Contains(text, []byte(fence)) {
		fence += "`"
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "### %s\n\n%stext\n%s%s\n", r.title, fence, text, fence)
	if u, err := url.Parse(r.link); err == nil && (u.Scheme == "https" || u.Scheme == "http") && u.Host != "" {
		fmt.Fprintf(&b, "\n<%s>\n", u)
	}
	b.WriteByte('\n')
	return b.Bytes()
}

func appendFile(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// table lays out rows in columns that are as wide as their widest cell.
func (r *result) table(rows [][]string) {
	var widths []int
	for _, row := range rows {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(plain(cell)))
		}
	}
	for _, row := range rows {
		var b strings.Builder
		for i, cell := range row {
			b.WriteString(pad(plain(cell), widths[i]+2))
		}
		r.add("%s", b.String())
	}
}

// field appends "  name       value", the name in a column of ten.
func (r *result) field(name, format string, args ...any) {
	if value := fmt.Sprintf(format, args...); strings.TrimSpace(value) != "" {
		r.add("  %s %s", pad(name, 10), value)
	}
}

// pad fills s up to width characters.
func pad(s string, width int) string {
	return s + strings.Repeat(" ", max(0, width-utf8.RuneCountInString(s)))
}

// rawJSON returns b for embedding into a result, and nothing when it is no JSON.
func rawJSON(b []byte) json.RawMessage {
	if !json.Valid(b) {
		return nil
	}
	return b
}

const (
	progressAfter = time.Second      // shorter waits need no word
	progressEvery = 5 * time.Second  // between lines that stay, as in a job's log
	progressFrame = time.Second / 10 // between updates of a line on a terminal
)

// progress tells on standard error what is waited for when it takes longer than
// a second, until the returned function is called.
func (a *app) progress(what string) (done func()) {
	start := a.now()
	quit, gone := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(gone)
		every := progressEvery
		if a.stderrTerminal {
			every = progressFrame
		}
		timer := time.NewTimer(progressAfter)
		defer timer.Stop()
		shown := false
		for {
			select {
			case <-quit:
				if shown && a.stderrTerminal {
					a.status("")
				}
				return
			case <-timer.C:
				shown = true
				a.status(fmt.Sprintf("%s… %s", what, a.now().Sub(start).Truncate(time.Second)))
				timer.Reset(every)
			}
		}
	}()
	return sync.OnceFunc(func() { close(quit); <-gone })
}

// status shows a line of progress: over the last one on a terminal.
func (a *app) status(s string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.last != "" && s != "" {
		s += " (" + a.last + ")"
	}
	if a.stderrTerminal {
		io.WriteString(a.stderr, "\r\x1b[K"+plain(s))
		return
	}
	fmt.Fprintln(a.stderr, plain(s))
}
