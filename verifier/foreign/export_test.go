package foreign

// Foreigner is for tests: certificates that no kit issues.
var Foreigner = foreigner
