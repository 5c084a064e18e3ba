package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/internal/testkit"
	hallmarkv1 "github.com/hallmarkd/hallmark/proto/hallmark/v1"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"hallmark": main})
}

// image is what most tests are about.
const image = "registry.example.com/payments/api@sha256:9f3c0e5b4f6a7d8c9e0f1a2b3c4d5e6f708192a3b4c5d6e7f8091a2b3c4d5e6f"

// other is a second image.
const other = "registry.example.com/payments/other@sha256:abababababababababababababababababababababababababababababababab"

// TestScripts runs the command as users do. Besides the usual ones the scripts
// have these commands:
//
//	answer METHOD FILE…   what the server answers to the method, in order
//	called [METHOD[+token]]…  exactly these calls were made since the last time
//	attached by-client    SignImages leaves attaching to the client
//	tampered              every bundle that is signed from here on is altered
//	vsa FILE REPO TRACK STAGE RESULT [SERVICE]   writes a summary for the image, signed by the gate key
//	evidence FILE         writes a test result for the image, signed by the job
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			tt := env.T().(testing.TB)
			p := startPeer(tt, nil)
			env.Values["peer"], env.Values["t"] = p, tt
			env.Vars = append(env.Vars,
				"HALLMARK_SERVER="+p.url,
				"HALLMARK_IDENTITY_TOKEN="+jwt(testkit.Service), "SERVICE_TOKEN="+jwt(testkit.Service), "OTHER="+other, "OTHER_TOKEN="+jwt("https://elsewhere.example.com"),
				"XDG_CONFIG_HOME="+env.WorkDir+"/config", "IMAGE="+image, "HEX="+image[strings.LastIndexByte(image, ':')+1:],
				"FINGERPRINT="+p.notary.Signer.Fingerprint(), "GITHUB_TOKENS="+gitHubTokens(tt),
				"SAN="+job.SAN, "ISSUER="+job.Issuer, "CI=", "GITHUB_ACTIONS=", "GITLAB_CI=")
			if !strings.HasSuffix(env.WorkDir, "script-tls") {
				return nil
			}
			config, ca := authority(tt)
			env.Vars = append(env.Vars, "TLS_SERVER="+startPeer(tt, config).url)
			return os.WriteFile(env.WorkDir+"/ca.pem", ca, 0o600)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"answer": func(ts *testscript.TestScript, _ bool, args []string) {
				var raw [][]byte
				for _, file := range args[1:] {
					raw = append(raw, []byte(ts.ReadFile(file)))
				}
				thePeer(ts).answer(args[0], raw...)
			},
			"called": func(ts *testscript.TestScript, _ bool, args []string) {
				if got := thePeer(ts).called(); !slices.Equal(got, args) {
					ts.Fatalf("calls %q, want %q", got, args)
				}
			},
			"attached": func(ts *testscript.TestScript, _ bool, _ []string) {
				p := thePeer(ts)
				p.mu.Lock()
				defer p.mu.Unlock()
				p.attach = hallmarkv1.AttachState_ATTACH_STATE_CLIENT
			},
			"tampered": func(ts *testscript.TestScript, _ bool, _ []string) {
				p := thePeer(ts)
				p.mu.Lock()
				defer p.mu.Unlock()
				p.tamper = func(b []byte) []byte { return bytes.Replace(b, []byte(`"treeSize":"`), []byte(`"treeSize":"1`), 1) }
			},
			"vsa":      writeVSA,
			"evidence": writeEvidence,
		},
	})
}

func thePeer(ts *testscript.TestScript) *peer { return ts.Value("peer").(*peer) }

func writeVSA(ts *testscript.TestScript, _ bool, args []string) {
	p := thePeer(ts)
	ref, err := attest.ParseImageRef(image)
	ts.Check(err)
	service := append(args, testkit.Service)[5]
	statement, err := attest.VSAStatement(service, attest.Image{Ref: ref}, attest.Promotion{
		Decided:     attest.Decided{Track: args[2], Stage: args[3], DecidedAt: "2026-11-20T12:00:00Z", Policy: attest.PolicyRef{URI: testkit.Service + "/policy/payments"}},
		ResourceURI: "oci://" + args[1], Level: 2,
	})
	ts.Check(err)
	statement = bytes.Replace(statement, []byte(`"PASSED"`), []byte(`"`+args[4]+`"`), 1)
	_, raw := p.record(ts.Value("t").(testing.TB), ref, statement, nil)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), raw, 0o600))
}

func writeEvidence(ts *testscript.TestScript, _ bool, args []string) {
	ref, err := attest.ParseImageRef(image)
	ts.Check(err)
	statement, err := json.Marshal(attest.Statement{
		Type:          attest.StatementType,
		Subject:       []attest.Subject{{Name: string(ref.Repository), Digest: map[string]string{"sha256": ref.Digest.Hex()}}},
		PredicateType: "https://in-toto.io/attestation/test-result/v0.1", Predicate: json.RawMessage(`{"result":"PASSED"}`),
	})
	ts.Check(err)
	_, raw := thePeer(ts).record(ts.Value("t").(testing.TB), ref, statement, &job)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), raw, 0o600))
}

// run1 runs the command in this process.
func run1(t *testing.T, a *app, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	a.stdin, a.stdout, a.stderr = strings.NewReader(""), &out, &errs
	if a.getenv == nil {
		dir := t.TempDir()
		a.getenv = func(name string) string {
			return map[string]string{"XDG_CONFIG_HOME": dir, "HALLMARK_IDENTITY_TOKEN": jwt(testkit.Service)}[name]
		}
	}
	if a.now == nil {
		a.now = func() time.Time { return time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC) }
	}
	a.backoff = backoff{attempts: 3, initial: "0.01s", most: "0.02s"}
	code = run(context.WithoutCancel(t.Context()), a, args)
	return code, out.String(), errs.String()
}
