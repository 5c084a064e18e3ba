package identity

import (
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/hallmarkd/hallmark/attest"
)

var (
	// Names are RFC 1123 labels and subdomains (Kubernetes, Object Names and IDs).
	// None can be a "." or ".." of a path.
	dnsLabel     = regexp.MustCompile(`^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$`)
	dnsSubdomain = regexp.MustCompile(`^[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?$`)
	objectUID    = regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z-]{7,127}$`)
)

// checkKubernetes checks what only the provider kubernetes has.
func (i *issuer) checkKubernetes() error {
	if err := i.checkFixedMapping(); err != nil {
		return err
	}
	shared := sharedClusterIssuer(i.Issuer.Issuer)
	switch {
	case shared && i.KnownAs == "":
		return fmt.Errorf("known_as: %s is the issuer of every cluster that was not given one: name yours by an https URL of its own", i.Issuer.Issuer)
	case shared && i.JWKSURI == "" && i.JWKSFile == "":
		return fmt.Errorf("jwks_file: at %s every host finds another cluster: give jwks_uri, or a file made with \"kubectl get --raw /openid/v1/jwks\"", i.Issuer.Issuer)
	case i.Audience == i.Issuer.Issuer || sharedClusterIssuer(i.Audience):
		return fmt.Errorf("audience: %q is the audience of the cluster's own API: whoever got such a token could act there as its pod", i.Audience)
	}
	if i.KnownAs == "" {
		return nil
	}
	if err := checkURL(i.KnownAs, false); err != nil {
		return fmt.Errorf("known_as: %w", err)
	}
	known := strings.TrimSuffix(i.KnownAs, "/")
	if slices.Contains(publicCI, known) || sharedClusterIssuer(i.KnownAs) || known == i.service || strings.HasPrefix(known, i.service+"/") {
		return fmt.Errorf("known_as: %s is the name of somebody else: give a URL of the cluster's own", i.KnownAs)
	}
	return nil
}

// checkFixedMapping refuses keys that providers of workloads without a source would
// ignore (attacks B10).
func (i *issuer) checkFixedMapping() error {
	switch {
	case i.Kind != attest.Workload:
		return fmt.Errorf("kind: provider %s names workloads, not persons", i.Provider)
	case i.ServerURL != "":
		return fmt.Errorf("server_url: tokens of provider %s name no source: leave it out", i.Provider)
	case len(i.Owners) > 0:
		return fmt.Errorf("owners: tokens of provider %s name no owner: say in the policy's roles which workloads may do what", i.Provider)
	}
	return nil
}

// sharedClusterIssuer reports whether iss is a name by which every cluster calls
// its own API server (attacks B06).
func sharedClusterIssuer(iss string) bool {
	u, err := url.Parse(iss)
	if err != nil {
		return false
	}
	host := u.Hostname()
	return host == "kubernetes" || host == "kubernetes.default" || host == "kubernetes.default.svc" || strings.HasPrefix(host, "kubernetes.default.svc.")
}

// account is what a bound service-account token says of its holder.
type account struct {
	namespace, name, uid string // of the service account
	pod, podUID          string
}

// parseAccount reads the claim kubernetes.io, which the API server writes into
// every token that is bound to an object. Tokens that are not bound to a pod do
// not end with one, and those of before have no end at all: they are refused.
func parseAccount(c claims) (account, error) {
	for name := range c {
		if strings.HasPrefix(name, "kubernetes.io/") {
			return account{}, attest.Errorf(attest.TokenClaims, "the token is a long-lived service-account token (claim %q): mount a projected one with an audience and an expiration", clip(name))
		}
	}
	k, err := c.object("kubernetes.io")
	if err != nil {
		return account{}, err
	}
	sa, err := k.object("serviceaccount")
	if err != nil {
		return account{}, err
	}
	if k["pod"] == nil {
		return account{}, attest.Errorf(attest.TokenClaims, "the token is not bound to a pod (kubernetes.io.pod): mount a projected service-account token into the pod that calls")
	}
	pod, err := k.object("pod")
	if err != nil {
		return account{}, err
	}
	var a account
	for _, f := range []struct {
		in   claims
		name string
		into *string
		form *regexp.Regexp
	}{
		{k, "namespace", &a.namespace, dnsLabel},
		{sa, "name", &a.name, dnsSubdomain}, {sa, "uid", &a.uid, objectUID},
		{pod, "name", &a.pod, dnsSubdomain}, {pod, "uid", &a.podUID, objectUID},
	} {
		if *f.into, err = f.in.required(f.name); err != nil {
			return account{}, err
		}
		if !f.form.MatchString(*f.into) {
			return account{}, attest.Errorf(attest.TokenClaims, "the token's claim %q in kubernetes.io is not of the form that Kubernetes gives names and uids", f.name)
		}
	}
	return a, nil
}

// object returns a claim that must be an object.
func (c claims) object(name string) (claims, error) {
	m, ok := c[name].(map[string]any)
	if !ok {
		return nil, attest.Errorf(attest.TokenClaims, "the token's claim %q must be an object, it is %s", name, describe(c, name))
	}
	return m, nil
}

// readKubernetes names the service account as Fulcio does. A service-account token
// says nothing of source, commit or workflow: those stay empty.
func (i *issuer) readKubernetes(c claims, id *attest.Identity) error {
	a, err := parseAccount(c)
	if err != nil {
		return err
	}
	if id.Subject != "system:serviceaccount:"+a.namespace+":"+a.name {
		return attest.Errorf(attest.TokenClaims, "the token's sub and its claim kubernetes.io name different service accounts")
	}
	id.SAN = "https://kubernetes.io/namespaces/" + a.namespace + "/serviceaccounts/" + a.name
	id.Build = attest.Build{
		RunID:  a.podUID,
		RunURI: strings.TrimSuffix(i.KnownIssuer(), "/") + "/namespaces/" + a.namespace + "/pods/" + a.pod + "/" + a.podUID,
	}
	return nil
}
