package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"regexp/syntax"
	"slices"
	"strings"

	"github.com/google/cel-go/cel"
	"github.com/google/cel-go/checker"
	"github.com/google/cel-go/common/ast"
	"github.com/google/cel-go/common/env"
	"github.com/google/cel-go/common/operators"
	"github.com/google/cel-go/common/types"
	"gopkg.in/yaml.v3"
)

// Bounds of one expression (attacks K03). Cost units are CEL's: about one per
// operation or ten characters looked at.
const (
	maxCost       = 100_000
	maxExpression = 8 << 10 // characters
	maxNesting    = 50
	maxRegexp     = 1000 // instructions of a compiled regular expression

	// What a load reckons with; larger claims run into maxCost when evaluated.
	usualText = 256 // characters of a claim
	usualList = 200 // groups of a person
)

// absent is the error of reading a claim that is not there.
type absent struct{ field string }

func (a absent) Error() string { return a.field + " is absent" }

// structs is the type provider of the expressions: Go structs whose string
// fields are absent when empty. There is no way from an expression to a struct
// but through a field that was type-checked.
type structs struct {
	types.Provider
	byName map[string]map[string]*types.FieldType
}

func (s structs) FindStructType(name string) (*types.Type, bool) {
	if _, ok := s.byName[name]; ok {
		return types.NewTypeTypeWithParam(types.NewObjectType(name)), true
	}
	return s.Provider.FindStructType(name)
}

func (s structs) FindStructFieldNames(name string) ([]string, bool) {
	if f, ok := s.byName[name]; ok {
		return names(f), true
	}
	return s.Provider.FindStructFieldNames(name)
}

func (s structs) FindStructFieldType(name, field string) (*types.FieldType, bool) {
	if f, ok := s.byName[name]; ok {
		t, ok := f[field]
		return t, ok
	}
	return s.Provider.FindStructFieldType(name, field)
}

// fieldsOf describes the tagged fields of a struct type: strings, 64-bit
// integers and lists of strings.
func fieldsOf(t reflect.Type) map[string]*types.FieldType {
	out := map[string]*types.FieldType{}
	for i := range t.NumField() {
		f := t.Field(i)
		name := f.Tag.Get("cel")
		field := func(obj any) reflect.Value { return reflect.ValueOf(obj).Elem().Field(i) }
		ft := &types.FieldType{
			IsSet:   func(obj any) bool { return !field(obj).IsZero() },
			GetFrom: func(obj any) (any, error) { return field(obj).Interface(), nil },
		}
		switch f.Type.Kind() {
		case reflect.String:
			ft.Type = types.StringType
			ft.GetFrom = func(obj any) (any, error) {
				if s := field(obj).String(); s != "" {
					return s, nil
				}
				return nil, absent{name}
			}
		case reflect.Int64:
			ft.Type = types.IntType
		case reflect.Slice:
			ft.Type = types.NewListType(types.StringType)
		default:
			panic("policy: field " + f.Name + " is of a kind that no expression reads")
		}
		out[name] = ft
	}
	return out
}

// environments are the worlds in which expressions are compiled.
type environments struct {
	caller, signer, foreign, decision *cel.Env
	types                             structs
}

// newEnvironments prepares them. The language is what a condition needs: logic,
// comparison, membership, prefixes, whole-string regular expressions and has,
// all, exists. "contains", conversions and arithmetic are left out.
func newEnvironments() (*environments, error) {
	s := structs{byName: map[string]map[string]*types.FieldType{}}
	object := func(of any) *types.Type {
		t := reflect.TypeOf(of)
		s.byName[t.String()] = fieldsOf(t)
		return types.NewObjectType(t.String())
	}
	caller, signer, foreign := object(CallerVars{}), object(SignerVars{}), object(ForeignVars{})
	image, provenance := object(ImageVars{}), object(ProvenanceVars{})

	var library env.LibrarySubset
	for _, f := range []string{
		operators.LogicalAnd, operators.LogicalOr, operators.LogicalNot, operators.Conditional,
		operators.Equals, operators.NotEquals, operators.Less, operators.LessEquals, operators.Greater, operators.GreaterEquals,
		operators.In, operators.Index, operators.NotStrictlyFalse, "size", "startsWith", "endsWith", "matches",
	} {
		library.IncludeFunctions = append(library.IncludeFunctions, &env.Function{Name: f})
	}
	library.IncludeMacros = []string{operators.Has, operators.All, operators.Exists}
	base, err := cel.NewCustomEnv(
		cel.StdLib(cel.StdLibSubset(&library)),
		cel.HomogeneousAggregateLiterals(),
		cel.EnableMacroCallTracking(), // or a conjunct with a macro could not be written out again
		cel.ParserExpressionSizeLimit(maxExpression), cel.ParserRecursionLimit(maxNesting),
		cel.ASTValidators(cel.ValidateComprehensionNestingLimit(1)),
		func(e *cel.Env) (*cel.Env, error) {
			s.Provider = e.CELTypeProvider()
			return cel.CustomTypeProvider(s)(e)
		},
	)
	if err != nil {
		return nil, fmt.Errorf("preparing expressions: %w", err)
	}
	out := &environments{types: s}
	for _, x := range []struct {
		into *(*cel.Env)
		vars []cel.EnvOption
	}{
		{&out.caller, []cel.EnvOption{cel.Variable("id", caller)}},
		{&out.signer, []cel.EnvOption{cel.Variable("id", signer)}},
		{&out.foreign, []cel.EnvOption{cel.Variable("id", foreign)}},
		{&out.decision, []cel.EnvOption{
			cel.Variable("image", image), cel.Variable("provenance", provenance), cel.Variable("caller", caller),
			cel.Variable("stage", cel.StringType), cel.Variable("track", cel.StringType),
		}},
	} {
		if *x.into, err = base.Extend(x.vars...); err != nil {
			return nil, fmt.Errorf("preparing expressions: %w", err)
		}
	}
	return out, nil
}

// condition is one compiled boolean expression. It is safe for concurrent use.
type condition struct {
	text  string
	where pos
	run   cel.Program
	parts []part // its conjuncts, to say which of them does not hold
}

// part is a conjunct of a condition.
type part struct {
	text   string
	run    cel.Program
	fields []string // "id.ref" …, in order of first use
}

// holds is nil when the expression is true of the variables; else it says why
// not. A runtime error, a cost above the limit and every other value are no
// (attacks K05).
func (c *condition) holds(vars map[string]any) error { return holds(c.run, vars) }

var errFalse = errors.New("is false")

func holds(run cel.Program, vars map[string]any) error {
	out, _, err := run.Eval(vars)
	if err != nil {
		return err
	}
	if out != types.True {
		return errFalse
	}
	return nil
}

// mentioned returns "name = value" for each field that the whole expression reads.
func (c *condition) mentioned(vars map[string]any, s structs) string {
	var all []string
	for _, p := range c.parts {
		all = append(all, p.fields...)
	}
	return show(all, vars, s)
}

// unmet returns the conjuncts that do not hold and what their fields are: claim
// by claim, wanted and got.
func (c *condition) unmet(vars map[string]any, s structs) (wanted, got string) {
	var want, fields []string
	for _, p := range c.parts {
		if holds(p.run, vars) != nil {
			want = append(want, p.text)
			fields = append(fields, p.fields...)
		}
	}
	return strings.Join(want, " && "), show(fields, vars, s)
}

// checks returns every conjunct with what its fields are, as a JSON array of
// {"wanted", "got", "met"}: wanted and got, claim by claim, for programs.
func (c *condition) checks(vars map[string]any, s structs) string {
	type check struct {
		Wanted string `json:"wanted"`
		Got    string `json:"got"`
		Met    bool   `json:"met"`
	}
	var all []check
	for _, p := range c.parts {
		all = append(all, check{p.text, show(p.fields, vars, s), holds(p.run, vars) == nil})
	}
	raw, err := json.Marshal(all)
	if err != nil {
		return "" // strings always marshal
	}
	return string(raw)
}

// met counts the conjuncts that hold: of several conditions, that with most is
// the one that was meant.
func (c *condition) met(vars map[string]any) int {
	n := 0
	for _, p := range c.parts {
		if holds(p.run, vars) == nil {
			n++
		}
	}
	return n
}

// show renders fields as "id.ref = …". Values are quoted: they come from tokens.
func show(fields []string, vars map[string]any, s structs) string {
	var out []string
	for _, f := range fields {
		variable, field, _ := strings.Cut(f, ".")
		line := f + " = " + s.value(vars[variable], field)
		if !slices.Contains(out, line) {
			out = append(out, line)
		}
	}
	return strings.Join(out, ", ")
}

func (s structs) value(obj any, field string) string {
	if ft := s.field(obj, field); ft != nil {
		v, err := ft.GetFrom(obj)
		switch {
		case err != nil:
			return "absent"
		case ft.Type == types.IntType:
			return fmt.Sprint(v)
		}
		return clip(fmt.Sprintf("%q", v))
	}
	return "absent"
}

func (s structs) field(obj any, name string) *types.FieldType {
	t := reflect.TypeOf(obj)
	if t == nil || t.Kind() != reflect.Pointer {
		return nil
	}
	return s.byName[t.Elem().String()][name]
}

// condition compiles the expression at n, or notes why it cannot be and returns nil.
func (l *loader) condition(e *cel.Env, n *yaml.Node, text string) *condition {
	if strings.TrimSpace(text) == "" {
		return nil // missing or empty: noted where it was read
	}
	checked, issues := e.Compile(text)
	if issues.Err() != nil {
		for _, i := range issues.Errors() {
			l.fail(n, "expression %q: %s", clip(text), l.cond.explain(e, i.Message))
		}
		return nil
	}
	if checked.OutputType() != cel.BoolType {
		l.fail(n, "expression %q must be true or false, not %s", clip(text), checked.OutputType())
		return nil
	}
	if err := lint(checked); err != nil {
		l.fail(n, "expression %q: %s", clip(text), err)
		return nil
	}
	if cost, err := e.EstimateCost(checked, sizes{}); err != nil || cost.Max > maxCost {
		l.fail(n, "expression %q costs too much to evaluate: simplify it", clip(text))
		return nil
	}
	c := &condition{text: text, where: l.at(n)}
	var err error
	if c.run, err = program(e, checked); err == nil {
		c.parts, err = conjuncts(e, checked)
	}
	if err != nil {
		l.fail(n, "expression %q: %s", clip(text), err)
		return nil
	}
	return c
}

func program(e *cel.Env, a *cel.Ast) (cel.Program, error) {
	return e.Program(a, cel.EvalOptions(cel.OptOptimize), cel.CostLimit(maxCost))
}

// sizes tells what CEL cannot know: how long claims are.
type sizes struct{}

func (sizes) EstimateSize(n checker.AstNode) *checker.SizeEstimate {
	if n.Type().Kind() == types.ListKind {
		return &checker.SizeEstimate{Max: usualList}
	}
	return &checker.SizeEstimate{Max: usualText}
}

func (sizes) EstimateCallCost(string, string, *checker.AstNode, []checker.AstNode) *checker.CallEstimate {
	return nil
}

// conjuncts splits a && b && c, so that a denial can name the part that failed.
func conjuncts(e *cel.Env, a *cel.Ast) ([]part, error) {
	var out []part
	for _, x := range split(a.NativeRep().Expr()) {
		text, err := cel.ExprToString(x, a.NativeRep().SourceInfo())
		if err != nil {
			return nil, err
		}
		checked, issues := e.Compile(text)
		if issues.Err() != nil {
			return nil, issues.Err()
		}
		run, err := program(e, checked)
		if err != nil {
			return nil, err
		}
		out = append(out, part{text, run, mentions(x)})
	}
	return out, nil
}

func split(x ast.Expr) []ast.Expr {
	if x.Kind() == ast.CallKind && x.AsCall().FunctionName() == operators.LogicalAnd {
		var out []ast.Expr
		for _, arg := range x.AsCall().Args() {
			out = append(out, split(arg)...)
		}
		return out
	}
	return []ast.Expr{x}
}

// mentions lists the variables' fields in x, in order of first use.
func mentions(x ast.Expr) []string {
	var out []string
	ast.PreOrderVisit(x, ast.NewExprVisitor(func(x ast.Expr) {
		if x.Kind() == ast.SelectKind && x.AsSelect().Operand().Kind() == ast.IdentKind {
			if f := x.AsSelect().Operand().AsIdent() + "." + x.AsSelect().FieldName(); !slices.Contains(out, f) {
				out = append(out, f)
			}
		}
	}))
	return out
}

// lint refuses what is valid CEL and yet never meant.
func lint(checked *cel.Ast) error {
	tree := checked.NativeRep()
	for _, x := range ast.MatchDescendants(ast.NavigateAST(tree), ast.AllMatcher()) {
		if err := lintNode(tree, x); err != nil {
			return err
		}
	}
	return nil
}

func lintNode(tree *ast.AST, x ast.NavigableExpr) error {
	switch t := tree.GetType(x.ID()); {
	case x.Kind() == ast.StructKind:
		return errors.New("an object cannot be made here: compare fields one by one")
	case x.Kind() == ast.LiteralKind && x.AsLiteral() == types.String(""):
		// An empty expectation would match an absent claim (attacks A23).
		return errors.New("compares with the empty text: an absent claim equals nothing; write has(…) or !has(…) to ask whether it is there")
	case x.Kind() == ast.IdentKind && t != nil && t.Kind() == types.StructKind:
		if p, ok := x.Parent(); !ok || p.Kind() != ast.SelectKind {
			return fmt.Errorf("use a field of %s, not the whole", x.AsIdent())
		}
	case t != nil && t.Kind() == types.DynKind:
		return errors.New("mixes types: what is compared must have one type that is known")
	case x.Kind() == ast.CallKind && x.AsCall().FunctionName() == "matches":
		return lintMatches(x.AsCall())
	case x.Kind() == ast.CallKind && (x.AsCall().FunctionName() == "startsWith" || x.AsCall().FunctionName() == "endsWith"):
		return lintPart(x.AsCall())
	}
	return nil
}

// names whose parts are separated by "/": half a part is also half of a name that
// somebody else may take.
var paths = []string{"source", "repository", "signer_uri", "san", "issuer_url", "base_repository"}

// lintPart demands whole parts of what startsWith and endsWith compare with
// (attacks B11): 'https://github.com/acme' also begins https://github.com/acme-evil.
func lintPart(call ast.CallExpr) error {
	if !call.IsMemberFunction() || call.Target().Kind() != ast.SelectKind || !slices.Contains(paths, call.Target().AsSelect().FieldName()) || len(call.Args()) != 1 {
		return nil
	}
	field, part := call.Target().AsSelect().FieldName(), call.Args()[0]
	s, ok := types.String(""), part.Kind() == ast.LiteralKind
	if ok {
		s, ok = part.AsLiteral().(types.String)
	}
	switch {
	case !ok:
		return fmt.Errorf("%s of %s needs its text as a literal", call.FunctionName(), field)
	case call.FunctionName() == "startsWith" && !strings.HasSuffix(string(s), "/"):
		return fmt.Errorf("startsWith(%q) also matches names that only begin so: end it with / or use ==", clip(string(s)))
	case call.FunctionName() == "endsWith" && !strings.HasPrefix(string(s), "/"):
		return fmt.Errorf("endsWith(%q) also matches names that only end so: begin it with / or use ==", clip(string(s)))
	}
	return nil
}

// lintMatches demands a pattern of the whole text: CEL's matches looks for the
// pattern anywhere in it (attacks B11).
func lintMatches(call ast.CallExpr) error {
	pattern := call.Args()[len(call.Args())-1]
	s, ok := types.String(""), pattern.Kind() == ast.LiteralKind
	if ok {
		s, ok = pattern.AsLiteral().(types.String)
	}
	if !ok {
		return errors.New("matches needs its pattern as a literal")
	}
	re, err := syntax.Parse(string(s), syntax.Perl)
	if err != nil {
		return fmt.Errorf("matches: %w", err)
	}
	// CEL has a limit of its own, but it panics on counted repetition: it
	// compiles without simplifying first (cel-go v0.31.0, RegexProgramSize).
	if prog, err := syntax.Compile(re.Simplify()); err != nil || len(prog.Inst) > maxRegexp {
		return fmt.Errorf("matches(%q) is too large", clip(string(s)))
	}
	whole := re.Op == syntax.OpConcat && re.Sub[0].Op == syntax.OpBeginText && re.Sub[len(re.Sub)-1].Op == syntax.OpEndText
	if !whole {
		return fmt.Errorf("matches(%q) would match a part: write ^(?:…)$ around it", string(s))
	}
	return nil
}

// explain adds to a compiler's message what would have been right.
func (x *environments) explain(e *cel.Env, message string) string {
	if f, ok := strings.CutPrefix(message, "undefined field '"); ok {
		f = strings.TrimSuffix(f, "'")
		var all []string
		for _, v := range e.Variables() {
			if known, ok := x.types.byName[v.Type().TypeName()]; ok && v.Type().Kind() == types.StructKind {
				all = append(all, v.Name()+" has "+strings.Join(names(known), ", "))
			}
		}
		return fmt.Sprintf("no field %q: %s", f, strings.Join(all, "; "))
	}
	if f, ok := strings.CutPrefix(message, "undeclared reference to '"); ok {
		f, _, _ = strings.Cut(f, "'")
		var vars []string
		for _, v := range e.Variables() {
			if v.Type().Kind() != types.TypeKind {
				vars = append(vars, v.Name())
			}
		}
		slices.Sort(vars)
		return fmt.Sprintf("%q is not known here: there are the variables %s and the functions has, all, exists, in, size, startsWith, endsWith, matches", f, strings.Join(vars, ", "))
	}
	return message
}

func names[T any](m map[string]T) []string {
	out := make([]string, 0, len(m))
	for n := range m {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

var _ checker.CostEstimator = sizes{}
