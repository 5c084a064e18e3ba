package web

import (
	"encoding/json"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
)

// imageData is what the page of one image shows.
type imageData struct {
	Ref      attest.ImageRef
	Decision gate.Decision // whether it is signed, with provenance, by a configured signer
	Record   attest.Record // of the provenance
	Fields   []field       // what the provenance says, each as well as it is known
	Said     []field       // what its job merely said
	Chain    []gate.BaseLink
	NoChain  string // why there is none
}

// field is one statement of a provenance.
type field struct {
	Name, Value string
	Grade       attest.Grade
}

// image is the page of one image: whether it is signed, what its provenance says and
// how each field is known, and what it is built on.
func (h *Handler) image(w http.ResponseWriter, r *http.Request, id attest.Identity) {
	ref, err := attest.ParseImageRef(r.URL.Query().Get("image"))
	if err != nil {
		h.fail(w, r, &id, err)
		return
	}
	d := imageData{Ref: ref}
	rec, p, err := h.cfg.Gate.Provenance(r.Context(), id, ref)
	if err == nil {
		d.Record, d.Fields, d.Said = rec, provenanceFields(p), callerFields(p)
		d.Decision, err = h.cfg.Gate.Verify(r.Context(), id, gate.VerifyRequest{Ref: ref})
	}
	if err != nil {
		h.fail(w, r, &id, err)
		return
	}
	if d.Chain, _, err = h.cfg.Gate.Base(r.Context(), id, ref); err != nil {
		d.NoChain = h.tell(err)
	}
	h.show(w, http.StatusOK, "image", view{"Image " + ref.Repository.Path(), &id, d})
}

// Where the fields of a provenance stand, as its grades name them.
const (
	definition = "/predicate/buildDefinition/"
	internal   = definition + "internalParameters/"
	details    = "/predicate/runDetails/"
)

// provenanceFields lists what a provenance says beside its caller's own words.
func provenanceFields(p attest.Provenance) []field {
	var out []field
	add := func(name, value, pointer string) {
		if value != "" {
			out = append(out, field{name, value, p.Grade(pointer)})
		}
	}
	add("subject", "that this job built this image", "/subject")
	add("builder.id", p.RunDetails.Builder.ID, details+"builder/id")
	add("invocationId", p.RunDetails.Metadata.InvocationID, details+"metadata/invocationId")
	claims := texts(p.Internal().Claims)
	for _, name := range slices.Sorted(maps.Keys(claims)) {
		add(name, claims[name], internal+"hallmark_claims/"+name)
	}
	add("token.issuer", p.Internal().Token.Issuer, internal+"hallmark_token/issuer")
	add("token.subject", p.Internal().Token.Subject, internal+"hallmark_token/subject")
	for i, dep := range p.BuildDefinition.ResolvedDependencies {
		value := dep.URI
		for _, alg := range slices.Sorted(maps.Keys(dep.Digest)) {
			value += " " + alg + ":" + dep.Digest[alg]
		}
		add(strings.TrimSpace("built from "+dep.Name), value, definition+"resolvedDependencies/"+strconv.Itoa(i))
	}
	base, at := p.Internal().Base, internal+"hallmark_base"
	add("base.result", string(base.Result), at+"/result")
	add("base.repository", string(base.Repository), at+"/repository")
	if !base.Digest.IsZero() {
		add("base.digest", base.Digest.String(), at+"/digest")
	}
	add("base.tag", base.Tag, at+"/tag")
	for _, c := range base.Claims {
		add("base, claimed by "+c.From, strings.TrimSuffix(c.Name+" "+string(c.Result)+": "+c.Detail, ": "), at+"/claims")
	}
	return out
}

// callerFields lists what the job said of its own. Nothing verifies it.
func callerFields(p attest.Provenance) []field {
	var out []field
	if hints := p.Internal().Hints; hints != nil && hints.Base != "" {
		out = append(out, field{"--base", hints.Base, p.Grade(internal + "hallmark_hints")})
	}
	facts := p.Internal().Caller
	for _, name := range slices.Sorted(maps.Keys(facts)) {
		out = append(out, field{name, facts[name], p.Grade(internal + "hallmark_caller/" + name)})
	}
	return out
}

// texts returns the claims that are there under the names that policies use.
func texts(b attest.Build) map[string]string {
	var out map[string]string
	raw, err := json.Marshal(b)
	if err != nil || json.Unmarshal(raw, &out) != nil {
		return nil // a struct of strings always marshals
	}
	return out
}

// verdictOn says in words whether an image is signed.
func verdictOn(d gate.Decision) string {
	if d.Verdict == gate.Allowed {
		return "SIGNED"
	}
	return "NOT ACCEPTED"
}
