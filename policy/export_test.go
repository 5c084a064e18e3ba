package policy

import "github.com/hallmarkd/hallmark/attest"

type panics struct{ celRule }

func (*panics) judge(*inquiry) attest.RuleResult { panic("a fault") }

// AddPanickingRule puts a rule into s that panics whenever it is judged.
func AddPanickingRule(s *Stage) {
	s.effective = append(s.effective, placedRule{&panics{}, s.Name, s.where})
}

// DropRules leaves s without any rule and without a stage before it.
func DropRules(s *Stage) { s.effective, s.After = nil, "" }
