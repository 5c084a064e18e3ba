package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/docker/docker-credential-helpers/client"
	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/hallmarkd/hallmark/attest"
)

// Credentials says where a registry's credentials come from: one of the two, or
// neither for none. Nothing is looked up anywhere else.
type Credentials struct {
	// File is of docker's config.json form. Only its "auths" are read, and in
	// them only the entry of this host; it is read again when it changes.
	File string
	// Helper is the absolute path of a docker-credential-* program.
	Helper string
}

const (
	helperAge     = 5 * time.Minute // how long a helper's answer is reused
	helperTimeout = 30 * time.Second
	maxCredential = 1 << 20
)

// authenticator returns what answers for the registry whose API is host.
func (c Credentials) authenticator(host string) (authn.Authenticator, error) {
	switch {
	case c.File != "" && c.Helper != "":
		return nil, attest.Errorf(attest.BadConfig, "registries: %s: credentials are a file or a helper, not both", host)
	case c.File != "":
		f := &fileAuth{path: c.File, host: host}
		_, err := f.Authorization()
		return f, err
	case c.Helper != "":
		if !filepath.IsAbs(c.Helper) {
			return nil, attest.Errorf(attest.BadConfig, "registries: %s: the credential helper must be an absolute path", host)
		}
		if info, err := os.Stat(c.Helper); err != nil || info.IsDir() || info.Mode()&0o111 == 0 {
			return nil, attest.Errorf(attest.BadConfig, "registries: %s: the credential helper %s is not an executable file", host, c.Helper)
		}
		return &helperAuth{path: c.Helper, host: host}, nil
	}
	return authn.Anonymous, nil
}

// fileAuth reads credentials from a file.
type fileAuth struct {
	path, host string

	mu      sync.Mutex // guards what follows
	changed time.Time
	size    int64
	config  *authn.AuthConfig
}

// Authorization implements authn.Authenticator. A file that has become
// unreadable is an error: nothing is fetched anonymously instead.
func (f *fileAuth) Authorization() (*authn.AuthConfig, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	info, err := os.Stat(f.path)
	if err != nil {
		return nil, attest.Errorf(attest.BadConfig, "registries: %s: credentials file: %w", f.host, err)
	}
	if f.config != nil && info.ModTime().Equal(f.changed) && info.Size() == f.size {
		return f.config, nil
	}
	config, err := readAuths(f.path, f.host)
	if err != nil {
		return nil, err
	}
	f.config, f.changed, f.size = config, info.ModTime(), info.Size()
	return config, nil
}

func readAuths(path, host string) (*authn.AuthConfig, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, attest.Errorf(attest.BadConfig, "registries: %s: credentials file: %w", host, err)
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxCredential))
	if err != nil {
		return nil, attest.Errorf(attest.BadConfig, "registries: %s: credentials file: %w", host, err)
	}
	var config struct {
		Auths map[string]authn.AuthConfig `json:"auths"`
	}
	// The error's text may quote the file, so it goes no further.
	if json.Unmarshal(data, &config) != nil {
		return nil, attest.Errorf(attest.BadConfig, "registries: %s: the credentials file is not docker's config.json form", host)
	}
	for _, key := range []string{host, "https://" + host, "https://" + host + "/v1/", "https://" + host + "/v2/"} {
		if auth, ok := config.Auths[key]; ok {
			return &auth, nil
		}
	}
	return nil, attest.Errorf(attest.BadConfig, "registries: %s: the credentials file has no entry for it under auths", host)
}

// helperAuth asks a docker credential helper.
type helperAuth struct {
	path, host string

	mu     sync.Mutex // guards what follows
	asked  time.Time
	config *authn.AuthConfig
}

// Authorization implements authn.Authenticator.
func (h *helperAuth) Authorization() (*authn.AuthConfig, error) {
	return h.AuthorizationContext(context.Background())
}

// AuthorizationContext implements authn.ContextAuthenticator.
func (h *helperAuth) AuthorizationContext(ctx context.Context) (*authn.AuthConfig, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.config != nil && time.Since(h.asked) < helperAge {
		return h.config, nil
	}
	ctx, cancel := context.WithTimeout(ctx, helperTimeout)
	defer cancel()
	server := h.host
	if server == dockerHubAPI {
		server = authn.DefaultAuthKey
	}
	got, err := client.Get(func(args ...string) client.Program {
		cmd := exec.CommandContext(ctx, h.path, args...)
		cmd.WaitDelay = time.Second
		return program{cmd}
	}, server)
	if err != nil { // its text repeats what the helper printed
		return nil, attest.Errorf(attest.BadConfig, "registries: %s: the credential helper %s gives no credentials", h.host, h.path)
	}
	config := &authn.AuthConfig{Username: got.Username, Password: got.Secret}
	if got.Username == "<token>" {
		config = &authn.AuthConfig{IdentityToken: got.Secret}
	}
	h.config, h.asked = config, time.Now()
	return config, nil
}

// program runs a helper under a context, which the client's own does not.
type program struct{ cmd *exec.Cmd }

func (p program) Input(in io.Reader) { p.cmd.Stdin = in }

func (p program) Output() ([]byte, error) {
	var out bytes.Buffer
	p.cmd.Stdout = &out
	err := p.cmd.Run()
	return out.Bytes(), err
}
