package archtest_test

import (
	"fmt"
	"testing"

	"github.com/hallmarkd/hallmark/internal/archtest"
)

// Every class of attack that the service must withstand has a test that is named
// by its id.
func TestAttackRows(t *testing.T) {
	tree, err := archtest.Parse(root, module)
	if err != nil {
		t.Fatal(err)
	}
	var rows []string
	for _, r := range []struct {
		group       string
		first, last int
	}{
		{"A", 1, 30}, {"B", 1, 13}, {"C", 1, 13}, {"D", 1, 13}, {"D", 15, 16},
		{"F", 6, 6}, {"F", 8, 11}, {"F", 13, 14}, {"G", 1, 6}, {"G", 10, 15},
		{"I", 1, 7}, {"J", 4, 5}, {"L", 1, 1},
	} {
		for n := r.first; n <= r.last; n++ {
			rows = append(rows, fmt.Sprintf("%s%02d", r.group, n))
		}
	}
	for _, row := range tree.Named(rows) {
		t.Errorf("no test is named by attack %s", row)
	}
}
