package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/hallmarkd/hallmark/attest"
)

// known is the file in which the trust root of each server is remembered.
type known struct {
	// Servers by URL.
	Servers map[string]pinned `json:"servers"`
}

type pinned struct {
	TrustRootSHA256 string `json:"trust_root_sha256"`
	Since           string `json:"since"` // RFC 3339, UTC
}

// pin accepts the trust root that a server showed: the one that
// --trust-root-sha256 names; without it the one remembered; the first one seen
// is remembered. A value that is given replaces what is remembered, because that
// is how a person accepts a new trust root.
func (a *app) pin(server, got string) error {
	given := a.TrustRootSHA256
	if given != "" {
		if _, err := attest.ParseHex(given); err != nil {
			return usagef("--trust-root-sha256 %q is not 64 lower-case hex digits", given)
		}
		if given != got {
			return mistrust(server, given+" (--trust-root-sha256)", got,
				"  Ask the operator whether the trust root was changed.")
		}
	}
	path, err := a.knownFile()
	if err != nil {
		a.detail("the trust root is not remembered: %v", err)
		return nil
	}
	k, err := readKnown(path)
	if err != nil {
		return err
	}
	switch old := k.Servers[server].TrustRootSHA256; {
	case old == got:
		return nil
	case old != "" && given == "":
		return mistrust(server, fmt.Sprintf("%s (since %s, in %s)", old, k.Servers[server].Since, path), got,
			"  If the operator confirms the new one, give it once with --trust-root-sha256.")
	case given == "":
		a.note("trust root of %s, seen for the first time: %s", server, got)
	}
	k.Servers[server] = pinned{got, attest.Time(a.now())}
	if err := writeKnown(path, k); err != nil {
		// A job without a home directory must not fail for this: it can pin only
		// by giving the fingerprint anyway.
		a.note("the trust root is not remembered: %v", err)
	}
	return nil
}

// mistrust is the error about a trust root that is not the expected one.
func mistrust(server, want, got, todo string) error {
	return &guideError{
		fmt.Errorf("the trust root of %s is not the expected one; no token was sent", server),
		[]string{"  expected " + plain(want), "  got      " + got, todo},
	}
}

// knownFile returns the path of known.json in the user's configuration directory.
func (a *app) knownFile() (string, error) {
	dir := a.getenv("XDG_CONFIG_HOME")
	if !filepath.IsAbs(dir) {
		var err error
		if dir, err = os.UserConfigDir(); err != nil {
			return "", err
		}
	}
	return filepath.Join(dir, "hallmark", "known.json"), nil
}

// readKnown reads known.json; none is an empty one. A file that cannot be read
// is an error: forgetting a pin would accept any trust root.
func readKnown(path string) (known, error) {
	k := known{map[string]pinned{}}
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return k, nil
	}
	if err != nil {
		return k, fmt.Errorf("reading the remembered trust roots: %w", err)
	}
	if err := json.Unmarshal(raw, &k); err != nil || k.Servers == nil {
		return k, fmt.Errorf("%s is damaged: repair it, or remove it to see every trust root for the first time again", path)
	}
	return k, nil
}

// writeKnown replaces known.json at once, readable by its owner only.
func writeKnown(path string, k known) error {
	raw, err := json.MarshalIndent(k, "", "  ")
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, "known-*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(append(raw, '\n'))
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}
