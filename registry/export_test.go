package registry

// Parse reads a manifest as an answer of this type would be read.
func Parse(raw []byte, contentType string) error { _, err := parse(raw, contentType); return err }

// ParseHint reads a caller's claim about a base.
func ParseHint(hint string) error { _, err := parseHint(hint); return err }
