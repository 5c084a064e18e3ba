package main

import (
	"bytes"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	hallmarkv1 "github.com/hallmarkd/hallmark/proto/hallmark/v1"
)

func TestPlain(t *testing.T) {
	for _, row := range []struct{ name, in, want string }{
		{"text", "payments/api → prod, 100 %", "payments/api → prod, 100 %"},
		{"J04 line break", "a\nALLOWED", `a\nALLOWED`},
		{"J04 carriage return", "DENIED\rALLOWED", `DENIED\rALLOWED`},
		{"J04 escape", "\x1b[2J\x1b]0;title\x07", `\x1b[2J\x1b]0;title\a`},
		{"J04 C1 control", "\u009b2J", `\u009b2J`},
		{"J04 right to left", "a\u202egpj", `a\u202egpj`},
		{"J04 without width", "pay\u200bments", `pay\u200bments`},
		{"J04 line separator", "a\u2028b", `a\u2028b`},
		{"J04 no UTF-8", "a\xffb", `a\ufffdb`},
		{"J04 delete", "a\x7fb", `a\x7fb`},
	} {
		t.Run(row.name, func(t *testing.T) {
			if got := plain(row.in); got != row.want {
				t.Errorf("plain(%q) = %q, want %q", row.in, got, row.want)
			}
		})
	}
}

func FuzzPlain(f *testing.F) {
	f.Add("a\nb\x1b[0m")
	f.Add("\u202e\u2066")
	f.Fuzz(func(t *testing.T, s string) {
		got := plain(s)
		if strings.ContainsFunc(got, func(r rune) bool {
			return r < ' ' || r >= 0x7f && r < 0xa0 || r >= 0x200b && r <= 0x200f || r >= 0x2028 && r <= 0x202e || r >= 0x2066 && r <= 0x2069
		}) {
			t.Errorf("plain(%q) = %q", s, got)
		}
		if plain(got) != got {
			t.Errorf("plain(%q) is not stable", s)
		}
	})
}

// The text of design section 7, letter by letter.
func TestGoldenDenial(t *testing.T) {
	a := &app{now: func() time.Time { return time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC) }}
	digest := func(start string) string { return "sha256:" + start + strings.Repeat("0", 64-len(start)) }
	d := &hallmarkv1.Decision{
		Id: 41822, Verdict: verdictDenied, Stage: "prod", Image: "registry.example.com/payments/api@" + digest("9f3c"),
		Url: "https://hallmark.example.com/d/41822", ProvenanceSummary: "acme/payments main 4be1d0c run 9912",
		Results: []*hallmarkv1.RuleResult{
			{Rule: "signed_by", Outcome: "ok"},
			{Rule: "soak", Outcome: "fail", Required: "24h in staging", Found: "6h12m", Next: "passes by itself Sat 21:40 CET (20:40 UTC)"},
			{Rule: "provenance", Outcome: "ok"},
			{Rule: "approvals", Outcome: "fail", Required: "2 of release-managers", Found: "1", Next: "ask: approver-2, approver-3   hallmark approve … --stage prod"},
			{Rule: "base_image", Outcome: "ok"}, {Rule: "not revoked", Outcome: "ok"},
		},
		Now:  []*hallmarkv1.StageEntry{{Digest: digest("77ab"), State: "DONE", Since: timestamppb.New(time.Date(2026, 11, 12, 3, 0, 0, 0, time.UTC))}},
		Safe: []*hallmarkv1.StageEntry{{Digest: digest("77ab")}, {Digest: digest("51c0")}},
	}
	const want = `DENIED  payments/api@sha256:9f3c… -> prod       decision 41822  https://hallmark.example.com/d/41822
  x soak       needs 24h in staging, has 6h12m     -> passes by itself Sat 21:40 CET (20:40 UTC)
  x approvals  needs 2 of release-managers, has 1  -> ask: approver-2, approver-3   hallmark approve … --stage prod
  ok signed_by, provenance (acme/payments main 4be1d0c run 9912), base_image, not revoked
now in prod: sha256:77ab… since 12 Nov   safe to return to: sha256:77ab…, sha256:51c0…
`
	r := a.decided(d, question{verb: "promote"})
	if diff := cmp.Diff(want, string(r.text(false))); diff != "" {
		t.Errorf("text (-want +got):\n%s", diff)
	}
	if md := string(r.markdown()); !strings.Contains(md, "```text\n"+want+"```\n") || !strings.Contains(md, "<https://hallmark.example.com/d/41822>") {
		t.Errorf("the job summary shows another text or no link:\n%s", md)
	}
	colour := string(r.text(true))
	for _, part := range []string{"\x1b[31mDENIED\x1b[0m  payments", "  \x1b[31mx\x1b[0m soak", "  \x1b[32mok\x1b[0m signed_by"} {
		if !strings.Contains(colour, part) {
			t.Errorf("no %q in %q", part, colour)
		}
	}
}

// A dry run says that nothing happened.
func TestDryRunDenial(t *testing.T) {
	a := &app{now: time.Now}
	r := a.decided(&hallmarkv1.Decision{
		Verdict: verdictDenied, Stage: "prod", Image: image, Results: []*hallmarkv1.RuleResult{{Rule: "after", Outcome: "fail", Found: "staging holds nothing"}},
	}, question{verb: "promote", dryRun: true})
	const want = `WOULD BE DENIED  payments/api@sha256:9f3c… -> prod
  x after  staging holds nothing
now in prod: nothing
`
	if diff := cmp.Diff(want, string(r.text(false))); diff != "" {
		t.Errorf("text (-want +got):\n%s", diff)
	}
}

// Text from a server cannot close the block that makes it harmless.
func TestMarkdownFence(t *testing.T) {
	r := result{title: "hallmark x", link: "javascript:alert(1)"}
	r.add("```\n<script>")
	md := string(r.markdown())
	if !strings.Contains(md, "````text\n```\\n<script>\n````\n") || strings.Contains(md, "javascript") {
		t.Errorf("markup came through:\n%s", md)
	}
}

func TestColourOnlyForTerminals(t *testing.T) {
	for _, row := range []struct {
		name     string
		terminal bool
		env      map[string]string
		want     bool
	}{
		{"terminal", true, nil, true},
		{"pipe", false, nil, false},
		{"NO_COLOR", true, map[string]string{"NO_COLOR": "1"}, false},
		{"dumb", true, map[string]string{"TERM": "dumb"}, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			var out bytes.Buffer
			a := &app{stdout: &out, stdoutTerminal: row.terminal, getenv: func(k string) string { return row.env[k] }}
			r := result{}
			r.mark(bad, "DENIED")
			if err := a.print(r); err != nil {
				t.Fatal(err)
			}
			if got := strings.Contains(out.String(), "\x1b["); got != row.want {
				t.Errorf("coloured is %t: %q", got, out.String())
			}
		})
	}
}

func TestProgress(t *testing.T) {
	for _, row := range []struct {
		name     string
		terminal bool
		wait     time.Duration
		want     string
	}{
		{"short on a terminal", true, 900 * time.Millisecond, ""},
		{"short in a log", false, 900 * time.Millisecond, ""},
		{"on a terminal one line", true, 1150 * time.Millisecond, "\r\x1b[Kwaiting… 1s\r\x1b[Kwaiting… 1s\r\x1b[K"},
		{"in a log a line each few seconds", false, 12 * time.Second, "waiting… 1s\nwaiting… 6s\nwaiting… 11s\n"},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var out bytes.Buffer
				a := &app{stderr: &out, stderrTerminal: row.terminal, now: time.Now}
				done := a.progress("waiting")
				time.Sleep(row.wait) // of the bubble's clock
				done()
				done() // once is enough, twice does no harm
				if got := out.String(); got != row.want {
					t.Errorf("progress %q, want %q", got, row.want)
				}
			})
		})
	}
}

// Why the last attempt failed stands beside what is waited for.
func TestProgressSaysWhy(t *testing.T) {
	var out bytes.Buffer
	a := &app{stderr: &out, now: time.Now, last: "connection\nrefused"}
	a.status("waiting… 3s")
	if got := out.String(); got != "waiting… 3s (connection\\nrefused)\n" {
		t.Errorf("%q", got)
	}
}
