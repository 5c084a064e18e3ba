package hallmarkv1

import _ "embed"

// OpenAPI is the OpenAPI v2 document of the REST API, as JSON.
//
//go:embed hallmark.swagger.json
var OpenAPI []byte
