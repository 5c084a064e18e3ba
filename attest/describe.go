package attest

import (
	"crypto/x509"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/digitorus/timestamp"
	"github.com/sigstore/fulcio/pkg/certificate"
)

// FactsVersion is that of Describe. An index made by another version is rebuilt.
const FactsVersion = 2

// RecordKind is what a record is.
type RecordKind string

// The kinds of record.
const (
	KindPrecertificate RecordKind = "precertificate"
	KindSignature      RecordKind = "signature"
	KindProvenance     RecordKind = "provenance"
	KindVSA            RecordKind = "vsa"
	KindPromotion      RecordKind = "promotion"
	KindDenial         RecordKind = "denial"
	KindEffect         RecordKind = "effect"
	KindPolicy         RecordKind = "policy"
	KindImport         RecordKind = "import"   // evidence that was signed elsewhere
	KindEvidence       RecordKind = "evidence" // any other predicate
)

var kinds = map[string]RecordKind{
	PredicateSignature: KindSignature, PredicateProvenance: KindProvenance, PredicateVSA: KindVSA,
	PredicatePromotion: KindPromotion, PredicateDenial: KindDenial, PredicateEffect: KindEffect,
	PredicatePolicy: KindPolicy, PredicateImport: KindImport,
}

// KindOf returns the kind of a record whose statement has this predicate type.
func KindOf(predicateType string) RecordKind {
	if kind, ok := kinds[predicateType]; ok {
		return kind
	}
	return KindEvidence
}

// Facet names.
const (
	FacetDigest     = "digest"     // of a subject, canonical
	FacetRepository = "repository" // of a subject
	FacetPredicate  = "predicate"  // predicate type
	FacetIdentity   = "identity"   // URI in the certificate's SAN
	FacetIssuer     = "issuer"     // OIDC issuer of that identity
	FacetCommit     = "commit"
	FacetSource     = "source" // source repository URI
	FacetRun        = "run"
	FacetBuilder    = "builder"
	FacetBase       = "base"  // digest of a base image
	FacetToken      = "token" // id of the token that was used
	FacetStage      = "stage" // track/stage
	FacetCaller     = "caller"
	FacetPromotion  = "promotion" // the promotion that an effect ends
	FacetTicket     = "ticket"
	FacetReason     = "reason"  // of a failed rule
	FacetSerial     = "serial"  // of a certificate, hex
	FacetRoot       = "root"    // foreign root under which an import verified
	FacetForeign    = "foreign" // who signed imported evidence: certificate name, or key:HEX
	FacetSays       = "says"    // predicate type of imported evidence
	FacetName       = "name"    // of other evidence
)

// Describe derives the kind, time, natural key and facets of an envelope that
// this service signed. It is a pure function: the index, a rebuild of it and any
// proof over its lists agree because of that.
func Describe(e Envelope) (Facts, error) {
	d := describer{}
	if e.PayloadType == PrecertificatePayload {
		cert, err := x509.ParseCertificate(e.Payload)
		if err != nil {
			return Facts{}, fmt.Errorf("parsing precertificate: %w", err)
		}
		d.certificate(cert)
		return d.facts(KindPrecertificate, cert.NotBefore, ""), nil
	}
	var s Statement
	if err := json.Unmarshal(e.Payload, &s); err != nil {
		return Facts{}, fmt.Errorf("parsing statement: %w", err)
	}
	kind := KindOf(s.PredicateType)
	d.add(FacetPredicate, s.PredicateType)
	for _, sub := range s.Subject {
		if h := sub.Digest["sha256"]; h != "" {
			d.add(FacetDigest, "sha256:"+h)
		}
		if _, err := ParseRepository(sub.Name); err == nil { // a policy's subject is no image
			d.add(FacetRepository, sub.Name)
		}
	}
	if len(e.Certificate) > 0 {
		cert, err := x509.ParseCertificate(e.Certificate)
		if err != nil {
			return Facts{}, fmt.Errorf("parsing certificate: %w", err)
		}
		d.certificate(cert)
	}
	key, err := d.predicate(kind, s, e.Payload)
	if err != nil {
		return Facts{}, fmt.Errorf("reading %s predicate: %w", kind, err)
	}
	ts, err := timestamp.ParseResponse(e.Timestamp)
	if err != nil {
		return Facts{}, fmt.Errorf("parsing timestamp: %w", err)
	}
	return d.facts(kind, ts.Time, key), nil
}

type describer struct{ facets []Facet }

func (d *describer) add(name, value string) {
	if value != "" {
		d.facets = append(d.facets, Facet{name, value})
	}
}

func (d *describer) facts(kind RecordKind, at time.Time, key string) Facts {
	slices.SortFunc(d.facets, func(a, b Facet) int {
		if c := strings.Compare(a.Name, b.Name); c != 0 {
			return c
		}
		return strings.Compare(a.Value, b.Value)
	})
	return Facts{kind, at.UTC().Truncate(time.Second), key, slices.Compact(d.facets)}
}

func (d *describer) certificate(cert *x509.Certificate) {
	d.add(FacetSerial, cert.SerialNumber.Text(16))
	for _, u := range cert.URIs {
		d.add(FacetIdentity, u.String())
	}
	ext, err := certificate.ParseExtensions(cert.Extensions)
	if err != nil {
		return // a certificate of the gate has no CI extensions
	}
	d.add(FacetIssuer, ext.Issuer)
	d.add(FacetCommit, ext.SourceRepositoryDigest)
	d.add(FacetSource, ext.SourceRepositoryURI)
	d.add(FacetRun, ext.RunInvocationURI)
}

// predicate adds what the predicate says and returns the natural key.
func (d *describer) predicate(kind RecordKind, s Statement, payload []byte) (string, error) {
	switch kind {
	case KindSignature:
		if len(s.Subject) == 0 {
			return "", nil
		}
		return SignatureKey(s.Subject[0].Annotations[requestAnnotation]), nil
	case KindProvenance:
		p, err := ParseProvenance(s.Predicate)
		if err != nil {
			return "", err
		}
		d.add(FacetBuilder, p.RunDetails.Builder.ID)
		d.add(FacetToken, p.Internal().Token.ID)
		d.base(p.Internal().Base)
		return p.Internal().Request, nil
	case KindEvidence:
		token, _ := s.TokenUse()
		d.add(FacetToken, token)
		d.add(FacetName, s.EvidenceName())
		if len(s.Subject) == 0 {
			return "", nil
		}
		return s.Subject[0].Annotations[requestAnnotation], nil
	case KindImport:
		var i Import
		if err := json.Unmarshal(s.Predicate, &i); err != nil {
			return "", err
		}
		d.add(FacetRoot, i.Root)
		d.add(FacetSays, i.PredicateType)
		d.add(FacetCaller, i.Importer.Key)
		if d.add(FacetForeign, i.Signer.SAN); i.Signer.Key != "" {
			d.add(FacetForeign, "key:"+i.Signer.Key)
		}
		img, err := s.Image()
		return ImportKey(img.Ref, i.Root, i.Digest), err
	case KindVSA:
		var v VSA
		if err := json.Unmarshal(s.Predicate, &v); err != nil {
			return "", err
		}
		d.add(FacetRepository, strings.TrimPrefix(v.ResourceURI, "oci://"))
		return SummaryKey(payload), nil
	case KindPromotion:
		var p Promotion
		if err := json.Unmarshal(s.Predicate, &p); err != nil {
			return "", err
		}
		d.decided(p.Decided)
		img, err := s.Image()
		return PromoteKey(img.Ref, p.Track, p.Stage, p.Replaces), err
	case KindDenial:
		var n Denial
		if err := json.Unmarshal(s.Predicate, &n); err != nil {
			return "", err
		}
		d.decided(n.Decided)
		for _, r := range n.Results {
			if r.Outcome == Fail || r.Outcome == Errored {
				d.add(FacetReason, string(r.Reason))
			}
		}
		img, err := s.Image()
		return DenialKey(img.Ref, n), err
	case KindEffect:
		var e Effect
		if err := json.Unmarshal(s.Predicate, &e); err != nil {
			return "", err
		}
		d.add(FacetPromotion, e.Promotion.String())
		d.add(FacetStage, e.Track+"/"+e.Stage)
		return EffectKey(e.Promotion), nil
	case KindPolicy:
		return Key("policy", Hash(s.Predicate).String()), nil
	}
	return "", nil
}

func (d *describer) decided(c Decided) {
	d.add(FacetStage, c.Track+"/"+c.Stage)
	d.add(FacetCaller, c.Caller.Key)
	d.add(FacetRun, c.Caller.Run)
	d.add(FacetTicket, c.Ticket)
}

// base adds the digests of a base that is known by more than somebody's word, of
// its index and of the manifests that the image is built on.
func (d *describer) base(b Base) {
	if !b.Result.Proven() && b.Result != Attested {
		return
	}
	digests := []Digest{b.Digest}
	for _, p := range b.Platforms {
		digests = append(digests, p.Base)
	}
	for _, e := range b.Equivalents {
		digests = append(digests, e.Digest)
	}
	for _, digest := range digests {
		if !digest.IsZero() {
			d.add(FacetBase, digest.String())
		}
	}
}
