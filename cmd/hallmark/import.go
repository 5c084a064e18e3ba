package main

import (
	"context"
	"fmt"

	"github.com/hallmarkd/hallmark/attest"
	hallmarkv1 "github.com/hallmarkd/hallmark/proto/hallmark/v1"
)

type importCmd struct {
	Image string `arg:"" placeholder:"REPO@DIGEST" help:"The image: HOST/PATH@sha256:…"`
	registryFlags
}

// importInfo is the JSON of "hallmark import".
type importInfo struct {
	Image    string         `json:"image"`    // HOST/PATH@sha256:HEX
	Imported []importedInfo `json:"imported"` // recorded: a configured foreign root vouches for them
	Skipped  []skippedInfo  `json:"skipped"`  // found beside the image and not recorded
}

type importedInfo struct {
	Root          string      `json:"root"`                // name in the service's configuration
	Form          string      `json:"form"`                // bundle, cosign-signature, cosign-envelope
	PredicateType string      `json:"predicate_type"`      // URI
	Signer        string      `json:"signer,omitempty"`    // name in the certificate
	Issuer        string      `json:"issuer,omitempty"`    // that vouched for that name
	Key           string      `json:"key,omitempty"`       // hex SHA-256 of the public key, without a certificate
	SignedAt      string      `json:"signed_at,omitempty"` // RFC 3339; empty when nothing proves it
	Record        *recordInfo `json:"record"`
	Repeated      bool        `json:"repeated,omitempty"` // the record was there before this call
}

type skippedInfo struct {
	Place   string `json:"place"`  // digest of a referrer, or a tag
	Reason  string `json:"reason"` // stable code
	Message string `json:"message"`
}

// Run has the service record what others have signed about an image.
func (c *importCmd) Run(ctx context.Context, a *app) error {
	ref, err := c.image(ctx, a, c.Image)
	if err != nil {
		return err
	}
	s, err := a.signIn(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	resp, err := call(ctx, s, hallmarkv1.NewSigningServiceClient(s).Import, &hallmarkv1.ImportRequest{Image: ref.String()})
	if err != nil {
		return err
	}
	info := importInfo{Image: ref.String(), Imported: []importedInfo{}, Skipped: []skippedInfo{}}
	for _, i := range resp.GetImported() {
		if i.GetRecord() == nil {
			return fmt.Errorf("the server answered with an import without its record")
		}
		info.Imported = append(info.Imported, importedInfo{
			i.GetRoot(), i.GetForm(), i.GetPredicateType(), i.GetSigner(), i.GetIssuer(), i.GetKey(), i.GetSignedAt(),
			newRecordInfo(i.GetRecord()), i.GetRepeatedRequest(),
		})
	}
	for _, k := range resp.GetSkipped() {
		info.Skipped = append(info.Skipped, skippedInfo{k.GetPlace(), k.GetReason(), k.GetMessage()})
	}
	if err := a.print(info.result()); err != nil {
		return err
	}
	if len(info.Imported) == 0 {
		return attest.Errorf(attest.NothingToImport, "nothing beside %s was signed under a foreign root that the service has configured", ref)
	}
	return nil
}

// formWords name the forms of foreign evidence for people.
var formWords = map[string]string{
	attest.FormBundle: "Sigstore bundle", attest.FormSignature: "cosign signature", attest.FormEnvelope: "cosign attestation",
}

func (info importInfo) result() result {
	r := result{title: "hallmark import", data: info}
	r.add("%s", info.Image)
	for _, i := range info.Imported {
		r.mark(good, "IMPORTED  %s, vouched for by the root %s%s", orElse(formWords[i.Form], i.Form), i.Root, map[bool]string{true: "  (recorded before)"}[i.Repeated])
		r.field("type", "%s", i.PredicateType)
		if i.Key != "" {
			r.field("signed by", "the key %s", i.Key)
		} else {
			r.field("signed by", "%s of %s", i.Signer, i.Issuer)
		}
		r.field("signed at", "%s", orElse(i.SignedAt, "not proved by anything"))
		r.field("record", "%s", number(i.Record))
	}
	for _, k := range info.Skipped {
		r.mark(warned, "SKIPPED  %s", k.Place)
		r.add("  %s [%s]", k.Message, k.Reason)
	}
	if len(info.Imported) > 0 {
		r.add("what is imported counts only for rules that name its root")
	}
	return r
}
