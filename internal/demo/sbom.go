package main

import (
	"debug/buildinfo"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

// writeSBOM lists the modules that a Go binary was built from, as CycloneDX: what the
// toolchain wrote into the binary itself.
func writeSBOM(binary, dir string) (string, error) {
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		return "", fmt.Errorf("reading what %s was built from: %w", filepath.Base(binary), err)
	}
	type component struct {
		Type    string `json:"type"`
		Name    string `json:"name"`
		Version string `json:"version"`
		PURL    string `json:"purl"`
	}
	var components []component
	for _, m := range info.Deps {
		components = append(components, component{"library", m.Path, m.Version, "pkg:golang/" + m.Path + "@" + m.Version})
	}
	out, err := json.MarshalIndent(map[string]any{
		"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1,
		"metadata":   map[string]any{"component": component{"application", info.Main.Path, info.Main.Version, "pkg:golang/" + info.Main.Path}},
		"components": components,
	}, "", " ")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "sbom.cdx.json")
	return path, os.WriteFile(path, out, 0o600)
}
