package web_test

import (
	"html"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/hallmarkd/hallmark/attest"
	"github.com/hallmarkd/hallmark/gate"
	"github.com/hallmarkd/hallmark/internal/testkit"
)

// row returns a row of a table as "cell | cell", without markup; "" when there is none.
func (p page) row(name string) string {
	for _, row := range strings.Split(p.body, "<tr>") {
		var cells []string
		for _, c := range regexp.MustCompile(`(?s)<t[hd][^>]*>(.*?)</t[hd]>`).FindAllStringSubmatch(row, -1) {
			text := regexp.MustCompile(`<[^>]*>`).ReplaceAllString(c[1], "")
			cells = append(cells, html.UnescapeString(strings.TrimSpace(text)))
		}
		if len(cells) > 0 && cells[0] == name {
			return strings.Join(cells[1:], " | ")
		}
	}
	return ""
}

// The page of an image says of each field how it is known, keeps apart what the job
// said, and shows what it is built on.
func TestImage(t *testing.T) {
	const evil = `<script>alert("x")</script>`
	s := testkit.NewStack(t, testkit.Options{})
	debian := s.PushBase("debian", "12")
	img := s.PushOn(debian, "12", "acme/api")
	hint := string(debian.Repository) + ":12"
	signed, err := s.Gate.Sign(t.Context(), s.Identity(s.Token(nil)), gate.SignRequest{Images: []gate.SignImage{{
		Ref: img.ImageRef, Base: hint, Facts: map[string]string{"team_note": evil},
	}}})
	if err != nil || signed[0].Err != nil {
		t.Fatal(err, signed)
	}
	promoted, err := s.Gate.Promote(t.Context(), s.Identity(s.PromoterToken()), gate.PromoteRequest{Ref: img.ImageRef, ToStage: "test"})
	if err != nil || promoted.Verdict != gate.Allowed {
		t.Fatal(err, promoted)
	}
	b := newBrowser(t, s)
	b.signIn(s.PersonToken("a-1", "audit"))
	at := "/a?image=" + url.QueryEscape(img.String())
	p := b.get(at)
	p.want(t, http.StatusOK, ">SIGNED</span>", signed[0].Provenance.ID.String(), "Nobody verified it")
	for name, want := range map[string]string{
		"subject":         "that this job built this image | caller",
		"commit":          testkit.Commit + " | claim",
		"source_uri":      "https://github.com/acme/api | claim",
		"builder.id":      signed[0].Builder + " | claim",
		"base.result":     "PROVEN_LAYERS | registry",
		"base.digest":     debian.Digest.String() + " | registry",
		"base.tag":        "12 | caller",
		"--base":          hint + " | caller",
		"team_note":       evil + " | caller",
		img.String():      "PROVEN_LAYERS " + signed[0].Image.Base.String() + "first 1 layer | registry record | FRESH since",
		debian.String():   "UNKNOWN | nothing registry | FRESHNESS_UNKNOWN no base is known | no, or not yours to see | ",
		"built from base": "",
	} {
		if got := p.row(name); !strings.HasPrefix(got, want) || want == "" && got != "" {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if row := p.row(img.String()); !strings.HasSuffix(row, "| yes "+promoted.Summary+" | acme/test") {
		t.Errorf("stages: %q", row)
	}
	for _, r := range regexp.MustCompile(`(?s)<td class="grade">(.*?)</td>`).FindAllStringSubmatch(p.body, -1) {
		grade, _, _ := strings.Cut(r[1], " ")
		if attest.Grade(grade).Rank() < 1 && grade != "nothing" {
			t.Errorf("a field is known by %q", r[1])
		}
	}
	if strings.Contains(p.body, "<script") {
		t.Error("what the job said is markup")
	}

	// The board and the decision lead there.
	link := `href="/a?image=` + url.QueryEscape(string(img.Repository)+"@"+img.Digest.String())
	for _, path := range []string{"/", "/d/" + strconv.FormatUint(promoted.Number, 10)} {
		body := strings.NewReplacer("%2f", "%2F", "%3a", "%3A", "@", "%40").Replace(b.get(path).body)
		if !strings.Contains(body, link) {
			t.Errorf("%s has no link %s", path, link)
		}
	}
}

// What cannot be shown is said, and to strangers not even that.
func TestImageRefuses(t *testing.T) {
	s := testkit.NewStack(t, testkit.Options{})
	img := s.PushApp("acme/api")
	b := newBrowser(t, s)
	at := "/a?image=" + url.QueryEscape(img.String())
	b.get(at).want(t, http.StatusUnauthorized, signInHeading)
	b.signIn(s.PersonToken("a-1", "audit"))
	b.get(at).want(t, http.StatusNotFound, "RECORD_NOT_FOUND")
	b.get("/a").want(t, http.StatusBadRequest)
	b.get("/a?image="+url.QueryEscape(string(img.Repository)+":12")).want(t, http.StatusBadRequest, "TAG_REFUSED")
	b.get("/a?image="+url.QueryEscape(`<script>`)).want(t, http.StatusBadRequest)

	if out, err := s.Gate.Sign(t.Context(), s.Identity(s.Token(nil)), gate.SignRequest{Images: []gate.SignImage{{Ref: img.ImageRef}}}); err != nil || out[0].Err != nil {
		t.Fatal(err, out)
	}
	stranger := newBrowser(t, s)
	stranger.signIn(s.PersonToken("a-2"))
	stranger.get(at).want(t, http.StatusForbidden, "ROLE_MISSING")

	// The chain of bases is the record's, with or without the registry.
	s.Registry.Close()
	p := b.get(at)
	p.want(t, http.StatusOK, ">SIGNED</span>")
	if row := p.row(img.String()); !strings.Contains(row, "PROVEN_LAYERS") || !strings.Contains(row, "FRESHNESS_UNKNOWN REGISTRY_UNAVAILABLE") {
		t.Errorf("without the registry: %q", row)
	}
}
