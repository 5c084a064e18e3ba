// Package interop has no code of its own. Its tests let the stock binaries of
// two cosign lines, and sigstore-go in process, judge what a running service
// signed and what somebody made of it afterwards, with the network cut off.
package interop
