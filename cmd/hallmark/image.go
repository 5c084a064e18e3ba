package main

import (
	"context"
	"regexp"
	"strings"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/registry"
)

// registryFlags are those of commands that name an image. The registry is only
// spoken to by --resolve, and by sign --attach=client.
type registryFlags struct {
	Resolve    bool     `help:"Look a tag up in its registry, print the digest, and send the digest."`
	CAFile     string   `name:"registry-ca-file" placeholder:"FILE" help:"PEM file with the certificate authorities of the registry, for --resolve and --attach=client."`
	PlainHTTP  bool     `name:"registry-plain-http" help:"The registry is on this machine and speaks plain HTTP, for --resolve and --attach=client."`
	TokenHosts []string `name:"registry-token-host" placeholder:"HOST" help:"Further host that issues the registry's tokens, for --resolve and --attach=client."`
}

// tagPattern is the grammar of tags (distribution-spec, "Pulling manifests").
var tagPattern = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)

// image reads REPO@DIGEST. A tag is refused before anything is called, unless
// --resolve asks to look it up; what is sent is the digest all the same.
func (f registryFlags) image(ctx context.Context, a *app, arg string) (attest.ImageRef, error) {
	ref, err := attest.ParseImageRef(arg)
	if attest.ReasonOf(err) != attest.TagRefused || !f.Resolve {
		return ref, err
	}
	i := strings.LastIndexByte(arg, ':')
	if strings.Contains(arg, "@") || i < strings.LastIndexByte(arg, '/') {
		return attest.ImageRef{}, err // a tag and a digest, or neither
	}
	repo, rerr := attest.ParseRepository(arg[:i])
	if rerr != nil {
		return attest.ImageRef{}, rerr
	}
	tag := arg[i+1:]
	if !tagPattern.MatchString(tag) {
		return attest.ImageRef{}, usagef("%q is not a tag", tag)
	}
	c, err := f.client(repo)
	if err != nil {
		return attest.ImageRef{}, err
	}
	defer a.progress("looking up " + arg)()
	d, err := c.Resolve(ctx, repo, tag)
	if err != nil {
		return attest.ImageRef{}, err
	}
	ref = attest.ImageRef{Repository: repo, Digest: d}
	a.note("%s is %s", arg, ref)
	return ref, nil
}

// client speaks to the registry of repo with the docker configuration of the job.
func (f registryFlags) client(repo attest.Repository) (*registry.Client, error) {
	return registry.New(registry.Config{
		Hosts:   []registry.Host{{Host: repo.Host(), CAFile: f.CAFile, PlainHTTP: f.PlainHTTP, TokenHosts: f.TokenHosts}},
		Ambient: true,
	})
}

// commit refuses what names a commit ambiguously (attacks B09).
func commit(s string) error {
	if !attest.CommitPattern.MatchString(s) {
		return usagef("--commit %q is not a whole commit: give its 40 or 64 lower-case hex digits (git rev-parse shows them)", s)
	}
	return nil
}
