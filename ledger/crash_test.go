package ledger_test

import (
	"log/slog"
	"os"
	"testing"

	"github.com/hallmarkd/hallmark/ledger"
)

func TestMain(m *testing.M) {
	ledger.RouteLibraryLogs(slog.New(slog.DiscardHandler))
	os.Exit(m.Run())
}
