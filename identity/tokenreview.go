package identity

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/hallmarkd/hallmark/attest"
)

// TokenReview says which API server is asked about tokens that have been verified:
// a token that is bound to a pod stays verifiable after the pod is gone (attacks
// A19).
type TokenReview struct {
	// URL is the https URL of the API: …/apis/authentication.k8s.io/v1/tokenreviews.
	URL string `yaml:"url"`
	// CAFile is a PEM file of the only authorities of the API server's TLS. Default:
	// those of the system.
	CAFile string `yaml:"ca_file,omitempty"`
	// TokenFile holds the service's own bearer token for that API server. It is
	// read for every question.
	TokenFile string `yaml:"token_file"`
}

const reviewPath = "/apis/authentication.k8s.io/v1/tokenreviews"

// reviewer asks one API server. Its URL comes from the configuration alone, so
// that the service's own token goes nowhere else, whatever a caller's token says
// (attacks A20).
type reviewer struct {
	name     string // of the issuer, for messages
	conf     TokenReview
	audience string
	client   *http.Client
	timeout  time.Duration
	log      *slog.Logger
}

func (i *issuer) newReviewer(c Config) (*reviewer, error) {
	conf := *i.TokenReview
	if err := checkURL(conf.URL, i.PlainHTTP); err != nil {
		return nil, fmt.Errorf("token_review: url: %w", err)
	}
	if !strings.HasSuffix(conf.URL, reviewPath) {
		return nil, fmt.Errorf("token_review: url: %q does not end in %s", conf.URL, reviewPath)
	}
	secure := &tls.Config{MinVersion: tls.VersionTLS12}
	if conf.CAFile != "" {
		secure.RootCAs = x509.NewCertPool()
		if err := addAuthorities(secure.RootCAs, conf.CAFile); err != nil {
			return nil, fmt.Errorf("token_review: %w", err)
		}
	}
	r := &reviewer{name: i.Name, conf: conf, audience: i.Audience, client: newClient(c, secure), timeout: c.FetchTimeout, log: c.Logger}
	if _, err := r.ownToken(); err != nil {
		return nil, fmt.Errorf("token_review: %w", err)
	}
	return r, nil
}

// ownToken reads the service's own token.
func (r *reviewer) ownToken() (string, error) {
	f, err := os.Open(r.conf.TokenFile)
	if err != nil {
		return "", fmt.Errorf("token_file: %w", err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxToken+1))
	if err != nil {
		return "", fmt.Errorf("token_file: %w", err)
	}
	token := strings.TrimSpace(string(raw))
	if token == "" || len(raw) > maxToken || strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return "", fmt.Errorf("token_file: %s holds no token", r.conf.TokenFile)
	}
	return token, nil
}

// review is an authentication.k8s.io/v1 TokenReview.
type review struct {
	APIVersion string       `json:"apiVersion"`
	Kind       string       `json:"kind"`
	Spec       reviewSpec   `json:"spec"`
	Status     reviewStatus `json:"status,omitzero"`
}

type reviewSpec struct {
	Token     string   `json:"token"`
	Audiences []string `json:"audiences"`
}

type reviewStatus struct {
	Authenticated bool     `json:"authenticated"`
	Audiences     []string `json:"audiences"`
	User          struct {
		Username string              `json:"username"`
		Extra    map[string][]string `json:"extra"`
	} `json:"user"`
}

// podUIDExtra is where the API server says which pod a token is bound to
// (Kubernetes, Managing Service Accounts, Additional metadata in Pod bound tokens).
const podUIDExtra = "authentication.kubernetes.io/pod-uid"

// check returns nil when the cluster says now that the verified token is good for
// this service and names id: TOKEN_REVOKED when it says that it is not,
// ISSUER_KEYS_UNAVAILABLE when it says nothing, or something else. Deny on any
// doubt: an API server that does not know audiences has not answered.
func (r *reviewer) check(ctx context.Context, token string, id attest.Identity) error {
	ctx, cancel := context.WithTimeout(ctx, r.timeout)
	defer cancel()
	status, err := r.ask(ctx, token)
	if err == nil && status.Authenticated {
		err = r.confirms(status, id)
	}
	switch {
	case err != nil:
		r.log.WarnContext(ctx, "asking the cluster about a token failed", "issuer", r.name, "error", err)
		return &attest.Error{
			Reason:  attest.KeysUnavailable,
			Message: fmt.Sprintf("the cluster of issuer %q cannot be asked just now whether the token still counts: try again; if it lasts, the operator finds the cause in the service's log", r.name),
			Err:     err,
		}
	case !status.Authenticated:
		return attest.Errorf(attest.TokenRevoked, "the cluster of issuer %q says that the token no longer counts: its pod or service account is gone. Call from a pod that runs", r.name)
	}
	return nil
}

func (r *reviewer) confirms(s reviewStatus, id attest.Identity) error {
	uid, ok := s.User.Extra[podUIDExtra]
	switch {
	case s.User.Username != id.Subject:
		return fmt.Errorf("it names %q, not %q: is it the cluster that issued the token?", clip(s.User.Username), clip(id.Subject))
	case !slices.Contains(s.Audiences, r.audience):
		return fmt.Errorf("it did not look at the audience %q", r.audience)
	case ok && !slices.Equal(uid, []string{id.Build.RunID}):
		return fmt.Errorf("it names another pod than the token")
	}
	return nil
}

// ask posts one TokenReview. What the server answers is not repeated in errors: it
// has the token in it.
func (r *reviewer) ask(ctx context.Context, token string) (reviewStatus, error) {
	own, err := r.ownToken()
	if err != nil {
		return reviewStatus{}, err
	}
	question, err := json.Marshal(review{
		APIVersion: "authentication.k8s.io/v1", Kind: "TokenReview",
		Spec: reviewSpec{Token: token, Audiences: []string{r.audience}},
	})
	if err != nil {
		return reviewStatus{}, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.conf.URL, bytes.NewReader(question))
	if err != nil {
		return reviewStatus{}, err
	}
	req.Header.Set("Authorization", "Bearer "+own)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	resp, err := r.client.Do(req)
	if err != nil {
		return reviewStatus{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusCreated && resp.StatusCode != http.StatusOK {
		return reviewStatus{}, fmt.Errorf("%s answers %s", r.conf.URL, resp.Status)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxDocument+1))
	if err != nil {
		return reviewStatus{}, err
	}
	return parseReview(body)
}

func parseReview(body []byte) (reviewStatus, error) {
	if len(body) > maxDocument {
		return reviewStatus{}, fmt.Errorf("its answer has more than %d bytes", maxDocument)
	}
	top, err := parseObject(body)
	if err != nil {
		return reviewStatus{}, fmt.Errorf("its answer: %w", err)
	}
	var answer review
	if json.Unmarshal(body, &answer) != nil || answer.Kind != "TokenReview" {
		return reviewStatus{}, fmt.Errorf("its answer is not a TokenReview")
	}
	// "authenticated" is left out when it is false; without any status the server
	// has not looked.
	if status, ok := top["status"].(map[string]any); !ok || len(status) == 0 {
		return reviewStatus{}, fmt.Errorf("its answer has no status")
	}
	return answer.Status, nil
}
