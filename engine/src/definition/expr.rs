//! CEL in its cage: the condition and data language of definitions.
//!
//! The crate behind it has no step limit and can exhaust the stack, so nothing reaches it before the caps below:
//! source length, bracket nesting, node count, depth, comprehension nesting, list sizes. Parsing and evaluation run on a
//! stack of their own. Integers from JSON are bound as signed. Figures behind the caps: the crate needs 96 nested
//! brackets to fail on 2 MiB in release and 12 in debug; three nested `all()` over 300 elements ran past a minute.

use super::Expr;
use crate::failure::Failure;
use cel::{
    Context, Env, ExecutionError, Program, Value as Cel,
    common::ast::{CallExpr, EntryExpr, Expr as Ast, IdedExpr, LiteralValue, SelectExpr, operators},
    objects::{Key, Map},
    parser::Macro,
};
use serde_json::{Number, Value};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, LazyLock, Mutex},
};

/// Longest source, in bytes.
pub const SOURCE_BYTES_MAX: usize = 1024;
/// Deepest bracket nesting in the source.
pub const NESTING_MAX: usize = 24;
/// Most nodes of the syntax tree after macro expansion.
pub const NODES_MAX: usize = 512;
/// Deepest syntax tree.
pub const DEPTH_MAX: usize = 64;
/// Comprehensions inside comprehensions.
pub const COMPREHENSIONS_MAX: usize = 2;
/// Longest list that a comprehension may walk; two nested make a million steps.
pub const LIST_MAX: usize = 1000;
/// Largest value that an expression may yield, in bytes of its texts and names. Without it a loop that doubles a text is
/// the death of the worker, and then of the next one.
pub const VALUE_BYTES_MAX: usize = 1 << 20;
/// Most steps of all comprehensions together, from the longest list they may walk.
const STEPS_MAX: usize = 4_000_000;
/// Most bytes of text that an evaluation may build on its way, from the longest text it may copy.
const TEXT_BYTES_MAX: usize = 64 << 20;
/// Functions and operators that make a new text or list out of others.
const COPYING: &[&str] = &[operators::ADD, "to_json", "from_json", "join", "split", "lower", "upper", "trim", "string"];
/// Stack for parsing and evaluation, in bytes. Debug frames of the parser are large.
const STACK_BYTES: usize = 16 << 20;
/// Compiled programs kept; the cache is emptied when it is full.
const CACHE_MAX: usize = 4096;

/// Functions beside CEL's own; `default` is a macro.
pub const FUNCTIONS: &[&str] = &[
    "to_json",
    "from_json",
    "default",
    "join",
    "split",
    "lower",
    "upper",
    "trim",
    "slice",
    "unique",
    "sort",
    "sum",
    "min",
    "max",
    "glob",
];

/// What an expression refers to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct References {
    /// Dotted paths from their root, for example `["steps", "plan", "output"]`; a path ends where an index or a call begins.
    pub variables: Vec<Vec<String>>,
    /// Names of called functions, operators excluded.
    pub functions: Vec<String>,
}

/// Why an expression is not accepted. `line` and `column` are 1-based inside the expression.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ExprError {
    pub message: String,
    pub line: u32,
    pub column: u32,
}

impl ExprError {
    fn whole(message: impl Into<String>) -> Self {
        Self { message: message.into(), line: 1, column: 1 }
    }
}

/// Where names come from during evaluation.
pub trait Scope {
    /// The value of a root name. `wanted` holds the paths below it that the expression reads, so that a large root need
    /// not be built whole. `None` if the name does not exist.
    fn root(&self, name: &str, wanted: &[&[String]]) -> Option<Value>;
}

impl Scope for serde_json::Map<String, Value> {
    fn root(&self, name: &str, _wanted: &[&[String]]) -> Option<Value> {
        self.get(name).cloned()
    }
}

struct Compiled {
    program: Program,
    references: References,
    /// Deepest nesting of comprehensions.
    loops: u32,
    /// Calls that copy texts or lists.
    copies: usize,
}

static ENV: LazyLock<Arc<Env>> = LazyLock::new(|| {
    let mut env = Env::stdlib();
    env.add_macro(default_macro()).expect("no other macro is called default");
    Arc::new(env)
});

static CACHE: LazyLock<Mutex<HashMap<String, Arc<Compiled>>>> = LazyLock::new(Mutex::default);

/// Parses an expression and lists what it refers to.
///
/// # Errors
/// A syntax error with its place, or a cap that is exceeded.
pub fn check(expr: &Expr) -> Result<References, ExprError> {
    compile(&expr.0).map(|compiled| compiled.references.clone())
}

/// Evaluates an expression.
///
/// # Errors
/// Permanent failures: `expr.missing` (a name or field does not exist), `expr.type`, `expr.overflow`, `expr.cost`,
/// `expr.syntax`.
pub fn evaluate(expr: &Expr, scope: &dyn Scope) -> Result<Value, Failure> {
    let compiled =
        compile(&expr.0).map_err(|e| Failure::permanent("expr.syntax", format!("{} in `{}`", e.message, expr.0)))?;
    let mut context = Context::with_env(ENV.clone());
    add_functions(&mut context, compiled.loops > 0);
    let mut size = Size::default();
    let roots: BTreeSet<&str> =
        compiled.references.variables.iter().filter_map(|p| p.first().map(String::as_str)).collect();
    for root in roots {
        let wanted: Vec<&[String]> =
            compiled.references.variables.iter().filter(|p| p[0] == root).map(|p| &p[1..]).collect();
        if let Some(value) = scope.root(root, &wanted) {
            wanted.iter().for_each(|path| size.add(&value, path));
            context.add_variable_from_value(root, to_cel(&value));
        }
    }
    size.check(&compiled, expr)?;
    let result = stacker::grow(STACK_BYTES, || compiled.program.execute(&context));
    let value = result.map_err(|error| execution_failure(&error, expr))?;
    from_cel(&value, &mut VALUE_BYTES_MAX.clone()).map_err(|why| match why {
        NoJson::Form => Failure::permanent("expr.type", format!("`{}` yields a value without a JSON form", expr.0)),
        NoJson::Size => {
            Failure::permanent("limit.size", format!("`{}` yields more than {VALUE_BYTES_MAX} bytes", expr.0))
        }
    })
}

/// The longest list (or object) and the longest text among the values that an expression reads.
#[derive(Default)]
struct Size {
    items: usize,
    text: usize,
}

impl Size {
    fn add(&mut self, mut value: &Value, path: &[String]) {
        for name in path {
            let Some(inner) = value.get(name) else { return };
            value = inner;
        }
        self.measure(value);
    }
    fn measure(&mut self, value: &Value) {
        match value {
            Value::String(text) => self.text = self.text.max(text.len()),
            Value::Array(items) => {
                self.items = self.items.max(items.len());
                items.iter().for_each(|item| self.measure(item));
            }
            Value::Object(map) => {
                self.items = self.items.max(map.len());
                map.values().for_each(|item| self.measure(item));
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
    /// Refuses what could run for minutes or fill the memory: the evaluator behind us knows no budget of its own.
    fn check(&self, compiled: &Compiled, expr: &Expr) -> Result<(), Failure> {
        let costly = |what: String| Err(Failure::permanent("expr.cost", format!("{what} in `{}`", expr.0)));
        if compiled.loops > 0 && self.items > LIST_MAX {
            return costly(format!("a list of {} items, a loop walks at most {LIST_MAX}", self.items));
        }
        // A list written in the expression is shorter than its source.
        let items = self.items.max(SOURCE_BYTES_MAX / 8).saturating_mul(compiled.copies + 1);
        if compiled.loops > 1 && items.saturating_pow(compiled.loops) > STEPS_MAX {
            return costly(format!("loops inside loops over {} items", self.items));
        }
        let times = if compiled.loops > 0 { self.items.max(1).saturating_pow(compiled.loops) } else { 1 };
        if self.text.saturating_mul(compiled.copies).saturating_mul(times) > TEXT_BYTES_MAX {
            return costly(format!("a text of {} bytes is copied too often", self.text));
        }
        Ok(())
    }
}

/// Evaluates a condition.
///
/// # Errors
/// As [`evaluate`]; `expr.type` if the result is not a boolean.
pub fn condition(expr: &Expr, scope: &dyn Scope) -> Result<bool, Failure> {
    match evaluate(expr, scope)? {
        Value::Bool(b) => Ok(b),
        other => Err(Failure::permanent(
            "expr.type",
            format!("`{}` is {}, a condition needs true or false", expr.0, type_name(&other)),
        )),
    }
}

/// Name of a JSON type for messages.
#[must_use]
pub fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn compile(source: &str) -> Result<Arc<Compiled>, ExprError> {
    if let Some(found) = CACHE.lock().expect("no panic while held").get(source) {
        return Ok(found.clone());
    }
    if source.len() > SOURCE_BYTES_MAX {
        return Err(ExprError::whole(format!("longer than {SOURCE_BYTES_MAX} bytes")));
    }
    scan(source)?;
    let program = stacker::grow(STACK_BYTES, || ENV.compile(source)).map_err(|errors| {
        let first = errors.errors.first();
        let (line, column) = first.map_or((1, 1), |e| e.pos);
        ExprError {
            message: first.map_or_else(|| "not an expression".to_owned(), |e| plain_message(&e.msg)),
            line: u32::try_from(line.max(1)).unwrap_or(1),
            column: u32::try_from(column.max(1)).unwrap_or(1),
        }
    })?;
    let mut survey = Survey::default();
    stacker::grow(STACK_BYTES, || survey.visit(program.expression(), 0, 0, &[]))?;
    survey.references.variables.sort();
    survey.references.variables.dedup();
    survey.references.functions.sort();
    survey.references.functions.dedup();
    let compiled =
        Arc::new(Compiled { program, references: survey.references, loops: survey.loops, copies: survey.copies });
    let mut cache = CACHE.lock().expect("no panic while held");
    if cache.len() >= CACHE_MAX {
        cache.clear();
    }
    cache.insert(source.to_owned(), compiled.clone());
    Ok(compiled)
}

/// The parser's wording is its generator's; the first line is the useful part.
fn plain_message(text: &str) -> String {
    text.lines().next().unwrap_or("not an expression").trim_start_matches("Syntax error: ").to_owned()
}

/// Refuses what would exhaust the parser before it sees it: deep brackets, long rows of unary operators.
fn scan(source: &str) -> Result<(), ExprError> {
    let (mut depth, mut unary, mut quote) = (0usize, 0usize, None);
    let mut chars = source.chars().peekable();
    while let Some(c) = chars.next() {
        if let Some(q) = quote {
            match c {
                '\\' => drop(chars.next()),
                c if c == q => quote = None,
                _ => {}
            }
            continue;
        }
        match c {
            '"' | '\'' => quote = Some(c),
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        unary = if matches!(c, '!' | '-') {
            unary + 1
        } else if c.is_whitespace() {
            unary
        } else {
            0
        };
        if depth > NESTING_MAX {
            return Err(ExprError::whole(format!("brackets nested deeper than {NESTING_MAX}")));
        }
        if unary > 64 {
            return Err(ExprError::whole("more than 64 unary operators in a row"));
        }
    }
    Ok(())
}

/// Walks the syntax tree once: counts, caps, references.
#[derive(Default)]
struct Survey {
    nodes: usize,
    loops: u32,
    copies: usize,
    references: References,
}

impl Survey {
    fn visit(&mut self, node: &IdedExpr, depth: usize, loops: usize, locals: &[String]) -> Result<(), ExprError> {
        self.nodes += 1;
        if self.nodes > NODES_MAX || depth > DEPTH_MAX {
            return Err(ExprError::whole(format!("larger than {NODES_MAX} nodes or deeper than {DEPTH_MAX}")));
        }
        if let Some(path) = name_path(&node.expr) {
            if !locals.contains(&path[0]) {
                self.references.variables.push(path);
            }
            return Ok(());
        }
        match &node.expr {
            Ast::Call(call) if guarded(call).is_some() => {
                // As `has` of the value alone: what leads there is read for the value as well.
                let before = guarded(call).and_then(|[value, _]| name_path(&value.expr)).map(|mut path| {
                    path.pop();
                    path
                });
                self.references
                    .variables
                    .extend(before.filter(|path| path.first().is_some_and(|n| !locals.contains(n))));
                guarded(call).into_iter().flatten().try_for_each(|part| self.visit(part, depth + 1, loops, locals))
            }
            Ast::Call(call) => {
                // What a `map` or `filter` adds to its own result (a name that no author can write) copies no text.
                let own = matches!(call.args.first().map(|a| &a.expr), Some(Ast::Ident(name)) if name.starts_with('@'));
                self.copies += usize::from(!own && COPYING.contains(&call.func_name.as_str()));
                if call.func_name.starts_with(|c: char| c.is_ascii_alphabetic()) {
                    self.references.functions.push(call.func_name.clone());
                }
                if let Some(target) = &call.target {
                    self.visit(target, depth + 1, loops, locals)?;
                }
                call.args.iter().try_for_each(|a| self.visit(a, depth + 1, loops, locals))
            }
            Ast::Comprehension(c) => {
                if loops + 1 > COMPREHENSIONS_MAX {
                    return Err(ExprError::whole(format!("comprehensions nested deeper than {COMPREHENSIONS_MAX}")));
                }
                self.loops = self.loops.max(u32::try_from(loops + 1).unwrap_or(u32::MAX));
                self.visit(&c.iter_range, depth + 1, loops, locals)?;
                let mut inner = locals.to_vec();
                inner.push(c.iter_var.clone());
                inner.extend(c.iter_var2.clone());
                inner.push(c.accu_var.clone());
                for part in [&c.accu_init, &c.loop_cond, &c.loop_step, &c.result] {
                    self.visit(part, depth + 1, loops + 1, &inner)?;
                }
                Ok(())
            }
            Ast::List(list) => list.elements.iter().try_for_each(|e| self.visit(e, depth + 1, loops, locals)),
            Ast::Select(select) => {
                // `has(a.b)`: the root is read, the tested field may be absent.
                self.visit(&select.operand, depth + 1, loops, locals)
            }
            Ast::Map(map) => map.entries.iter().try_for_each(|e| match &e.expr {
                EntryExpr::MapEntry(entry) => {
                    self.visit(&entry.key, depth + 1, loops, locals)?;
                    self.visit(&entry.value, depth + 1, loops, locals)
                }
                EntryExpr::StructField(field) => self.visit(&field.value, depth + 1, loops, locals),
            }),
            Ast::Struct(_) => Err(ExprError::whole("typed literals are not part of this language")),
            Ast::Ident(_) | Ast::Literal(_) | Ast::Unspecified => Ok(()),
        }
    }
}

/// `a.b.c` as its segments; `None` for anything but selections on an identifier.
fn name_path(expr: &Ast) -> Option<Vec<String>> {
    match expr {
        Ast::Ident(name) => Some(vec![name.clone()]),
        Ast::Select(SelectExpr { operand, field, test: false }) => {
            let mut path = name_path(&operand.expr)?;
            path.push(field.clone());
            Some(path)
        }
        _ => None,
    }
}

/// Longest path that `default` follows from its root, in fields; of a longer one only the last may be absent. Chosen: every field is
/// looked up once for each before it.
const DEFAULT_FIELDS_MAX: usize = 16;

/// `default(a.b.c, y)` is `has(a.b) && a.b != null && has(a.b.c) && a.b.c != null ? a.b.c : y`: whatever of it is absent or null. Of
/// what is no path of names, `default(f(x).b, y)`, only the last field may be.
fn default_macro() -> Macro {
    Macro::global("default", 2, |helper, _target, args| {
        let Some(IdedExpr { expr: Ast::Select(_), .. }) = args.first() else { return Ok(None) };
        let otherwise = args.pop().expect("two arguments");
        let value = args.pop().expect("two arguments");
        let follows = name_path(&value.expr).is_some_and(|path| path.len() <= DEFAULT_FIELDS_MAX + 1);
        // From the whole path to its root.
        let (mut fields, mut at) = (Vec::new(), &value);
        while let Ast::Select(select) = &at.expr
            && (follows || fields.is_empty())
        {
            let test = SelectExpr { operand: select.operand.clone(), field: select.field.clone(), test: true };
            fields.push((Ast::Select(test), at.clone()));
            at = &select.operand;
        }
        let call = |name: &str, args| Ast::Call(CallExpr { func_name: name.to_owned(), target: None, args });
        let mut guard: Option<IdedExpr> = None;
        for (test, field) in fields.into_iter().rev() {
            let null = helper.next_expr(Ast::Literal(LiteralValue::Null));
            for part in [test, call(operators::NOT_EQUALS, vec![field, null])] {
                let part = helper.next_expr(part);
                guard = Some(match guard {
                    Some(before) => helper.next_expr(call(operators::LOGICAL_AND, vec![before, part])),
                    None => part,
                });
            }
        }
        let Some(guard) = guard else { return Ok(None) };
        Ok(Some(helper.next_expr(call(operators::CONDITIONAL, vec![guard, value, otherwise]))))
    })
}

/// Value and alternative of a conditional whose condition only asks for the presence of its value.
fn guarded(call: &CallExpr) -> Option<[&IdedExpr; 2]> {
    let [condition, value, otherwise] = &call.args[..] else { return None };
    let asks = call.func_name == operators::CONDITIONAL
        && name_path(&value.expr).is_some_and(|path| only_asks_for(&condition.expr, &path));
    asks.then_some([value, otherwise])
}

/// Whether a condition only asks for the presence of what leads to `path`, as that of `default` does.
fn only_asks_for(condition: &Ast, path: &[String]) -> bool {
    let leads = |ast: &Ast| name_path(ast).is_some_and(|before| path.starts_with(&before));
    match condition {
        Ast::Call(call) if call.func_name == operators::LOGICAL_AND => {
            call.args.iter().all(|part| only_asks_for(&part.expr, path))
        }
        Ast::Call(call) if call.func_name == operators::NOT_EQUALS => match &call.args[..] {
            [field, null] => matches!(null.expr, Ast::Literal(LiteralValue::Null)) && leads(&field.expr),
            _ => false,
        },
        Ast::Select(select) if select.test => {
            let field = Ast::Select(SelectExpr { test: false, ..select.clone() });
            leads(&field)
        }
        _ => false,
    }
}

fn execution_failure(error: &ExecutionError, expr: &Expr) -> Failure {
    let (code, message) = match error {
        ExecutionError::NoSuchKey(key) => ("expr.missing", format!("there is no `{key}`")),
        ExecutionError::UndeclaredReference(name) => ("expr.missing", format!("there is no `{name}` here")),
        ExecutionError::IndexOutOfBounds(_) => ("expr.missing", "the index is out of bounds".to_owned()),
        ExecutionError::Overflow(op, ..) => ("expr.overflow", format!("overflow in `{op}`")),
        ExecutionError::DivisionByZero(_) | ExecutionError::RemainderByZero(_) => {
            ("expr.overflow", "division by zero".to_owned())
        }
        ExecutionError::FunctionError { function, message } if message.starts_with("limit:") => {
            ("expr.cost", format!("{function}: {message}"))
        }
        // Other errors print whole values; only their kind is told.
        other => ("expr.type", other.to_string().chars().take(200).collect()),
    };
    Failure::permanent(code, format!("{message} in `{}`", expr.0))
}

/// JSON to CEL. Whole numbers become signed integers, so that `inputs.max + 1` works.
fn to_cel(value: &Value) -> Cel {
    match value {
        Value::Null => Cel::Null,
        Value::Bool(b) => Cel::Bool(*b),
        Value::Number(n) => n.as_i64().map_or_else(|| Cel::Float(n.as_f64().unwrap_or(f64::NAN)), Cel::Int),
        Value::String(s) => Cel::String(Arc::new(s.clone())),
        Value::Array(items) => Cel::List(Arc::new(items.iter().map(to_cel).collect())),
        Value::Object(map) => Cel::Map(Map {
            map: Arc::new(map.iter().map(|(k, v)| (Key::String(Arc::new(k.clone())), to_cel(v))).collect()),
        }),
    }
}

/// Why a value has no JSON text that we keep.
enum NoJson {
    Form,
    Size,
}

/// CEL to JSON. `room` is what is left of the bytes that all of it may have: one text that stands in a list a thousand
/// times is one allocation there and a thousand here.
fn from_cel(value: &Cel, room: &mut usize) -> Result<Value, NoJson> {
    let mut take = |bytes: usize| {
        *room = room.checked_sub(bytes + 8).ok_or(NoJson::Size)?;
        Ok(())
    };
    match value {
        Cel::String(s) => take(s.len())?,
        _ => take(0)?,
    }
    Ok(match value {
        Cel::Null => Value::Null,
        Cel::Bool(b) => Value::Bool(*b),
        Cel::Int(i) => Value::from(*i),
        Cel::UInt(u) => Value::from(*u),
        Cel::Float(f) => Value::Number(Number::from_f64(*f).ok_or(NoJson::Form)?),
        Cel::String(s) => Value::String(s.to_string()),
        Cel::List(items) => {
            let mut out = Vec::new();
            for item in items.iter() {
                out.push(from_cel(item, room)?);
            }
            Value::Array(out)
        }
        Cel::Map(map) => {
            // Sorted: the map behind it is hashed, and equal values must have equal texts.
            let mut sorted = BTreeMap::new();
            for (key, value) in map.map.iter() {
                let key = match key {
                    Key::String(s) => s.to_string(),
                    Key::Int(i) => i.to_string(),
                    Key::Uint(u) => u.to_string(),
                    Key::Bool(b) => b.to_string(),
                };
                *room = room.checked_sub(key.len()).ok_or(NoJson::Size)?;
                sorted.insert(key, from_cel(value, room)?);
            }
            Value::Object(sorted.into_iter().collect())
        }
        _ => return Err(NoJson::Form),
    })
}

/// The functions beside CEL's own. Each is bounded by its input; in an expression that `loops`, lists that are made on
/// the way are no longer than those that come from outside.
fn add_functions(context: &mut Context<'_, '_>, loops: bool) {
    type Texts = Arc<String>;
    type List = Arc<Vec<Cel>>;
    fn fail(function: &str, message: impl ToString) -> ExecutionError {
        ExecutionError::function_error(function, message)
    }
    fn number(function: &str, value: &Cel) -> Result<f64, ExecutionError> {
        match value {
            #[expect(clippy::cast_precision_loss, reason = "only for ordering; sums of integers stay integers")]
            Cel::Int(i) => Ok(*i as f64),
            Cel::Float(f) => Ok(*f),
            _ => Err(fail(function, "needs numbers")),
        }
    }
    let added = [
        context.add_function("to_json", |value: Cel| -> Result<Cel, ExecutionError> {
            let json = from_cel(&value, &mut VALUE_BYTES_MAX.clone()).map_err(|why| match why {
                NoJson::Form => fail("to_json", "no JSON form"),
                NoJson::Size => fail("to_json", format!("limit: at most {VALUE_BYTES_MAX} bytes")),
            })?;
            Ok(Cel::String(Arc::new(json.to_string())))
        }),
        context.add_function("from_json", move |text: Texts| -> Result<Cel, ExecutionError> {
            let value: Value = serde_json::from_str(&text).map_err(|e| fail("from_json", e))?;
            let mut size = Size::default();
            size.measure(&value);
            if loops && size.items > LIST_MAX {
                return Err(fail("from_json", format!("limit: at most {LIST_MAX} items")));
            }
            Ok(to_cel(&value))
        }),
        context.add_function("join", |list: List, by: Texts| -> Result<Cel, ExecutionError> {
            let parts: Option<Vec<&str>> =
                list.iter().map(|v| if let Cel::String(s) = v { Some(s.as_str()) } else { None }).collect();
            let parts = parts.ok_or_else(|| fail("join", "needs a list of text"))?;
            if parts.iter().map(|p| p.len() + by.len()).sum::<usize>() > VALUE_BYTES_MAX {
                return Err(fail("join", format!("limit: at most {VALUE_BYTES_MAX} bytes")));
            }
            Ok(Cel::String(Arc::new(parts.join(&by))))
        }),
        context.add_function("split", move |text: Texts, by: Texts| -> Result<Cel, ExecutionError> {
            let most = if loops { LIST_MAX } else { usize::MAX };
            let parts: Vec<Cel> = text
                .split(by.as_str())
                .take(most.saturating_add(1))
                .map(|s| Cel::String(Arc::new(s.to_owned())))
                .collect();
            if parts.len() > most {
                return Err(fail("split", format!("limit: at most {LIST_MAX} items")));
            }
            Ok(Cel::List(Arc::new(parts)))
        }),
        context.add_function("lower", |text: Texts| -> Cel { Cel::String(Arc::new(text.to_lowercase())) }),
        context.add_function("upper", |text: Texts| -> Cel { Cel::String(Arc::new(text.to_uppercase())) }),
        context.add_function("trim", |text: Texts| -> Cel { Cel::String(Arc::new(text.trim().to_owned())) }),
        context.add_function("slice", |list: List, from: i64, to: i64| -> Cel {
            let len = list.len();
            let end = usize::try_from(to).unwrap_or(0).min(len);
            let start = usize::try_from(from).unwrap_or(0).min(end);
            Cel::List(Arc::new(list[start..end].to_vec()))
        }),
        context.add_function("unique", |list: List| -> Result<Cel, ExecutionError> {
            if list.len() > LIST_MAX {
                return Err(fail("unique", format!("limit: at most {LIST_MAX} items")));
            }
            let mut out: Vec<Cel> = Vec::new();
            for item in list.iter() {
                if !out.contains(item) {
                    out.push(item.clone());
                }
            }
            Ok(Cel::List(Arc::new(out)))
        }),
        context.add_function("sort", |list: List| -> Result<Cel, ExecutionError> {
            let mut out = list.to_vec();
            let mut comparable = true;
            out.sort_by(|a, b| {
                a.partial_cmp(b).unwrap_or_else(|| {
                    comparable = false;
                    std::cmp::Ordering::Equal
                })
            });
            if comparable { Ok(Cel::List(Arc::new(out))) } else { Err(fail("sort", "items cannot be compared")) }
        }),
        context.add_function("sum", |list: List| -> Result<Cel, ExecutionError> {
            if list.iter().all(|v| matches!(v, Cel::Int(_))) {
                let total = list.iter().try_fold(0i64, |acc, v| match v {
                    Cel::Int(i) => acc.checked_add(*i),
                    _ => None,
                });
                return total.map(Cel::Int).ok_or_else(|| fail("sum", "overflow"));
            }
            list.iter().map(|v| number("sum", v)).sum::<Result<f64, _>>().map(Cel::Float)
        }),
        context.add_function("min", |list: List| pick(&list, "min", |a, b| a < b, number)),
        context.add_function("max", |list: List| pick(&list, "max", |a, b| a > b, number)),
        context.add_function("glob", |text: Texts, pattern: Texts| -> bool { glob(&text, &pattern) }),
    ];
    debug_assert!(added.iter().all(Result::is_ok), "a function name collides with CEL's own");
}

fn pick(
    list: &[Cel],
    function: &str,
    better: fn(f64, f64) -> bool,
    number: fn(&str, &Cel) -> Result<f64, ExecutionError>,
) -> Result<Cel, ExecutionError> {
    let mut best: Option<(&Cel, f64)> = None;
    for item in list {
        let value = number(function, item)?;
        if best.is_none_or(|(_, b)| better(value, b)) {
            best = Some((item, value));
        }
    }
    best.map(|(item, _)| item.clone()).ok_or_else(|| ExecutionError::function_error(function, "the list is empty"))
}

/// `*` any run of characters, `?` one character. Linear in time: the last star is the only place to go back to.
#[must_use]
pub fn glob(text: &str, pattern: &str) -> bool {
    let (t, p): (Vec<char>, Vec<char>) = (text.chars().collect(), pattern.chars().collect());
    let (mut i, mut j, mut star) = (0, 0, None);
    while i < t.len() {
        if j < p.len() && (p[j] == '?' || (p[j] != '*' && p[j] == t[i])) {
            i += 1;
            j += 1;
        } else if j < p.len() && p[j] == '*' {
            star = Some((j, i));
            j += 1;
        } else if let Some((at, from)) = star {
            star = Some((at, from + 1));
            i = from + 1;
            j = at + 1;
        } else {
            return false;
        }
    }
    p[j..].iter().all(|c| *c == '*')
}

#[cfg(test)]
#[path = "expr_tests.rs"]
mod tests;
