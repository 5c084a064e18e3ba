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
const FactsVersion = 1

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
	KindEvidence       RecordKind = "evidence" // any other predicate
)

var kinds = map[string]RecordKind{
	PredicateSignature: KindSignature, PredicateProvenance: KindProvenance, PredicateVSA: KindVSA,
	PredicatePromotion: KindPromotion, PredicateDenial: KindDenial, PredicateEffect: KindEffect,
	PredicatePolicy: KindPolicy,
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
	FacetReason     = "reason" // of a failed rule
	FacetSerial     = "serial" // of a certificate, hex
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
		for _, b := range append([]Digest{p.Internal().Base.Digest}, baseDigests(p.Internal().Base)...) {
			if text, _ := b.MarshalText(); p.Internal().Base.Result == ProvenLayers {
				d.add(FacetBase, string(text))
			}
		}
		return p.Internal().Request, nil
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

func baseDigests(b Base) []Digest {
	var out []Digest
	for _, p := range b.Platforms {
		out = append(out, p.Base)
	}
	return out
}
