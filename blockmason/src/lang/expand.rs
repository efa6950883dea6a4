//! From statements to a flat graph: parameters, includes, compounds.
//!
//! A scope is the body of the graph or of one instance of a compound. Order does not matter within
//! it: parameters and compounds are collected first, then elements, then edges, then invariants, then
//! ports.

mod invariant;

use super::Define;
use super::ast::{Compound, Element, End, Name, Part, Setting, Statement, Value as Written};
use super::diag::{Bag, Diagnostic};
use super::load::Loaded;
use super::params::{Context, Entry, Params, Value};
use super::source::Span;
use super::spec::{self, EdgeSpec, ElementSpec};
use super::suggest;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// Elements, edges and instances of compounds of one graph.
const MOST_ITEMS: usize = 100_000;
/// Bytes of all names and values of one graph.
const MOST_BYTES: usize = 64 << 20;
/// What a value or parameter costs beside its bytes.
const OVERHEAD: usize = 128;
/// Statements looked at, those of a compound once for each instance.
const MOST_STEPS: usize = 10_000_000;
/// Bytes of one value.
const LONGEST_VALUE: usize = 64 << 10;
/// Compounds within compounds, and parameters that need parameters.
const DEEPEST: usize = 16;

/// What a name of the graph stands for.
enum Named {
    Element(usize),
    /// A compound's instance: its outer ports, and the elements and ports they mean.
    Instance {
        ty: String,
        ports: BTreeMap<String, Option<(usize, String)>>,
    },
    /// It could not be made; an error says so, and edges to it are dropped without another.
    Broken,
}

/// A statement and where it stands.
struct Item<'a> {
    statement: &'a Statement,
    context: Arc<Context>,
    depth: usize,
}

/// A parameter that `${KEY}` means.
#[derive(Clone)]
struct Bound {
    values: Vec<Value>,
    /// Where it was given.
    origin: Span,
    /// It could not be evaluated, an error says so; what uses it is left out without another.
    broken: bool,
}

struct Scope<'a, 's> {
    /// The names of the compound instances around it, each with a dot.
    prefix: String,
    params: BTreeMap<String, Bound>,
    compounds: BTreeMap<&'a str, (&'a Compound, Arc<Context>)>,
    /// The scope in which the compound was defined.
    outer: Option<&'s Scope<'a, 's>>,
    via: Option<Span>,
    depth: usize,
}

impl<'a, 's> Scope<'a, 's> {
    fn param(&self, key: &str) -> Option<&Bound> {
        self.params.get(key).or_else(|| self.outer?.param(key))
    }

    fn param_names(&self) -> Vec<&str> {
        let outer = self.outer.map_or_else(Vec::new, Scope::param_names);
        self.params.keys().map(String::as_str).chain(outer).collect()
    }

    fn compound(&'s self, name: &str) -> Option<(&'a Compound, Arc<Context>, &'s Scope<'a, 's>)> {
        match self.compounds.get(name) {
            Some((compound, context)) => Some((compound, context.clone(), self)),
            None => self.outer?.compound(name),
        }
    }
}

pub(super) struct Expander<'a> {
    loaded: &'a Loaded,
    bag: &'a mut Bag,
    pub(super) elements: Vec<ElementSpec>,
    pub(super) edges: Vec<EdgeSpec>,
    pub(super) invariants: Vec<spec::Invariant>,
    names: HashMap<String, (Named, Span)>,
    items: usize,
    bytes: usize,
    steps: usize,
    /// A limit was exceeded: nothing more is made.
    stopped: bool,
    /// A value could not be evaluated since this was last cleared.
    spoilt: bool,
}

impl<'a> Expander<'a> {
    pub(super) fn new(loaded: &'a Loaded, bag: &'a mut Bag) -> Self {
        let (elements, edges, names) = (Vec::new(), Vec::new(), HashMap::new());
        Expander {
            loaded,
            bag,
            elements,
            edges,
            invariants: Vec::new(),
            names,
            items: 0,
            bytes: 0,
            steps: 0,
            stopped: false,
            spoilt: false,
        }
    }

    /// True if errors have been found.
    pub(super) fn failed(&self) -> bool {
        !self.bag.is_empty()
    }

    /// Expands the graph file. Each define stands in the source of its span.
    pub(super) fn run(&mut self, defines: Vec<(Define, Span)>) {
        let Some(root) = self.loaded.files.first() else { return };
        let bound = defines.into_iter().map(|(define, span)| {
            let context = Arc::new(Context { folder: define.folder, scope: String::new() });
            let value = Value { text: define.value, span, origin: None, context, target: None };
            (define.key, Bound { values: vec![value], origin: span, broken: false })
        });
        let scope = Scope {
            prefix: String::new(),
            params: bound.collect(),
            compounds: BTreeMap::new(),
            outer: None,
            via: None,
            depth: 0,
        };
        let context = Arc::new(Context { folder: root.folder.clone(), scope: String::new() });
        self.body(&root.body, context, scope, None);
        self.aim();
    }

    /// Fills in what element references inside compounds mean.
    fn aim(&mut self) {
        for element in &mut self.elements {
            for value in element.params.entries.iter_mut().flat_map(|entry| &mut entry.values) {
                if !value.context.scope.is_empty() {
                    let full = format!("{}{}", value.context.scope, value.text);
                    value.target = self.names.contains_key(&full).then_some(full);
                }
            }
        }
    }

    /// Counts what is made against the limits; false if it is too much.
    fn spend(&mut self, items: usize, bytes: usize, span: Span) -> bool {
        self.items += items;
        self.bytes += bytes;
        let message = if self.items > MOST_ITEMS {
            format!("the graph has more than {MOST_ITEMS} elements and edges")
        } else if self.bytes > MOST_BYTES {
            format!("the names and values of the graph are larger than {} MiB", MOST_BYTES >> 20)
        } else if self.steps > MOST_STEPS {
            String::from("the compounds of the graph are used too often")
        } else {
            return true;
        };
        if !self.stopped {
            self.stopped = true;
            self.bag.push(Diagnostic::new("mason::too-large", span, message));
        }
        false
    }

    /// Makes the elements and edges of one scope, and the ports of the compound that it is.
    fn body(
        &mut self,
        body: &'a [Statement],
        context: Arc<Context>,
        mut scope: Scope<'a, '_>,
        compound: Option<(&'a Compound, &str)>,
    ) {
        let mut items = Vec::new();
        self.gather(body, context, 0, &mut HashSet::new(), &mut items);
        self.bind(&items, &mut scope);
        self.define(&items, &mut scope);
        for item in &items {
            if let Statement::Element(element) = item.statement
                && !self.stopped
            {
                self.element(element, &item.context, &scope);
            }
        }
        for item in &items {
            if let Statement::Chain(ends) = item.statement
                && !self.stopped
            {
                self.chain(ends, &scope.prefix);
            }
        }
        for item in &items {
            if let Statement::Invariant(invariant) = item.statement
                && !self.stopped
            {
                self.invariant(invariant, &item.context, &scope);
            }
        }
        if let Some((compound, name)) = compound {
            self.ports(compound, name, &scope);
        }
    }

    /// The statements of a scope, with those of included files in the place of the include. A file that
    /// is included twice in a scope counts once.
    fn gather(
        &mut self,
        body: &'a [Statement],
        context: Arc<Context>,
        depth: usize,
        seen: &mut HashSet<usize>,
        items: &mut Vec<Item<'a>>,
    ) {
        self.steps += body.len();
        for statement in body {
            let Statement::Include(name) = statement else {
                items.push(Item { statement, context: context.clone(), depth });
                continue;
            };
            let Some(index) = self.loaded.includes.get(&name.span) else { continue };
            if !seen.insert(*index) || !self.spend(1, 0, name.span) {
                continue;
            }
            let file = &self.loaded.files[*index];
            let folder = file.folder.clone();
            let inner = Arc::new(Context { folder, scope: context.scope.clone() });
            self.gather(&file.body, inner, depth + 1, seen, items);
        }
    }

    /// Binds the `param` statements of a scope. What is bound already (by `-D`, or by the compound's
    /// own parameters) stays; the including file wins over the included.
    fn bind(&mut self, items: &[Item<'a>], scope: &mut Scope<'a, '_>) {
        let mut written: BTreeMap<&'a str, (&'a Name, &'a Written, &Item<'a>)> = BTreeMap::new();
        for item in items {
            let Statement::Param { key, value } = item.statement else { continue };
            match written.get(key.text.as_str()) {
                Some((first, _, before)) if before.depth == item.depth => {
                    let message = format!("parameter `{}` is set twice", key.text);
                    let error = Diagnostic::new("mason::duplicate-name", key.span, message);
                    self.bag.push(error.label(first.span, "first here"));
                }
                Some((_, _, before)) if before.depth < item.depth => {}
                _ => {
                    written.insert(&key.text, (key, value, item));
                }
            }
        }
        let mut open = Vec::new();
        for key in written.keys() {
            self.resolve(key, &written, scope, &mut open);
        }
    }

    /// Evaluates one `param` statement, those it needs first.
    fn resolve(
        &mut self,
        key: &str,
        written: &BTreeMap<&'a str, (&'a Name, &'a Written, &Item<'a>)>,
        scope: &mut Scope<'a, '_>,
        open: &mut Vec<&'a str>,
    ) {
        let Some((name, value, item)) = written.get(key) else { return };
        if scope.params.contains_key(key) {
            return;
        }
        let cyclic = open.contains(&key);
        if cyclic || open.len() >= DEEPEST {
            let message = match cyclic {
                true => format!("parameter `{key}` is made of itself"),
                false => format!("parameters that need parameters, more than {DEEPEST} deep"),
            };
            let path = open.iter().copied().chain([key]).collect::<Vec<_>>().join(" -> ");
            self.bag.push(Diagnostic::new("mason::param-cycle", name.span, message).help(path));
            let bound = Bound { values: Vec::new(), origin: name.span, broken: true };
            scope.params.insert(key.to_owned(), bound);
            return;
        }
        open.push(&name.text);
        for part in &value.parts {
            if let Part::Param(inner) = part {
                self.resolve(&inner.text, written, scope, open);
            }
        }
        open.pop();
        // A cycle through this key has bound it by now.
        if !scope.params.contains_key(key) {
            let bound = self.evaluate(value, &item.context, scope, value.span);
            scope.params.insert(key.to_owned(), bound);
        }
    }

    /// Collects the compounds of a scope.
    fn define(&mut self, items: &[Item<'a>], scope: &mut Scope<'a, '_>) {
        for item in items {
            let Statement::Compound(compound) = item.statement else { continue };
            let name = compound.name.text.as_str();
            if let Some((first, _)) = scope.compounds.get(name) {
                let message = format!("compound `{name}` is defined twice");
                let error = Diagnostic::new("mason::duplicate-name", compound.name.span, message);
                self.bag.push(error.label(first.name.span, "first here"));
                continue;
            }
            scope.compounds.insert(name, (compound, item.context.clone()));
        }
    }

    /// The value of a parameter.
    fn evaluate(
        &mut self,
        written: &'a Written,
        context: &Arc<Context>,
        scope: &Scope<'a, '_>,
        origin: Span,
    ) -> Bound {
        let before = std::mem::replace(&mut self.spoilt, false);
        let values = self.value(written, context, scope);
        Bound { values, origin, broken: std::mem::replace(&mut self.spoilt, before) }
    }

    /// Replaces the parameters in a value. A bare `${KEY}` stands for all the values of KEY.
    fn value(&mut self, written: &'a Written, context: &Arc<Context>, scope: &Scope<'a, '_>) -> Vec<Value> {
        if let [Part::Param(key)] = written.parts.as_slice() {
            let Some(bound) = self.bound(key, scope) else { return Vec::new() };
            let bytes = bound.values.iter().map(|value| OVERHEAD + value.text.len()).sum();
            let moved =
                |value: &Value| Value { span: written.span, origin: Some(bound.origin), ..value.clone() };
            let values = bound.values.iter().map(moved).collect();
            return if self.spend(0, bytes, written.span) { values } else { Vec::new() };
        }
        let mut value = Value {
            text: String::new(),
            span: written.span,
            origin: None,
            context: context.clone(),
            target: None,
        };
        for part in &written.parts {
            match part {
                Part::Text(text) => value.text.push_str(text),
                Part::Param(key) => {
                    let Some(bound) = self.bound(key, scope) else { return Vec::new() };
                    self.append(&mut value, key, bound);
                }
            }
            if value.text.len() > LONGEST_VALUE {
                self.spoilt = true;
                let message = format!("a value longer than {} KiB", LONGEST_VALUE >> 10);
                self.bag.push(Diagnostic::new("mason::too-large", written.span, message));
                return Vec::new();
            }
        }
        let bytes = OVERHEAD + value.text.len();
        if self.spend(0, bytes, written.span) { vec![value] } else { Vec::new() }
    }

    /// Appends a parameter to a text. Where it is the beginning, the place it was given in is where
    /// relative paths start.
    fn append(&mut self, value: &mut Value, key: &Name, bound: &Bound) {
        match bound.values.as_slice() {
            [inner] => {
                if value.text.is_empty() && !inner.text.is_empty() {
                    value.context = inner.context.clone();
                }
                value.text.push_str(&inner.text);
                value.origin.get_or_insert(bound.origin);
            }
            [] => {}
            many => {
                self.spoilt = true;
                let message = format!("parameter `{}` has {} values, a text takes one", key.text, many.len());
                let error = Diagnostic::new("mason::bad-value", key.span, message);
                self.bag.push(error.label(bound.origin, "given here"));
            }
        }
    }

    fn bound<'b>(&mut self, key: &Name, scope: &'b Scope<'a, '_>) -> Option<&'b Bound> {
        let bound = scope.param(&key.text);
        self.spoilt |= bound.is_none_or(|bound| bound.broken);
        if bound.is_none() && self.bag.wants("mason::undefined", key.span) {
            let message = format!("parameter `{}` is not defined", key.text);
            let near = suggest::did_you_mean(&key.text, scope.param_names());
            let help = near.unwrap_or_else(|| {
                format!("give it with `-D {0}=VALUE`, or a default with `param {0} = VALUE`", key.text)
            });
            self.bag.push(Diagnostic::new("mason::undefined", key.span, message).help(help));
        }
        bound
    }

    fn entry(&mut self, setting: &'a Setting, context: &Arc<Context>, scope: &Scope<'a, '_>) -> Entry {
        let values = setting.values.iter().flat_map(|value| self.value(value, context, scope)).collect();
        self.spend(0, OVERHEAD + setting.key.text.len(), setting.key.span);
        Entry { key: setting.key.text.clone(), span: setting.key.span, values }
    }

    /// Makes an element, or all that a compound makes of it.
    fn element(&mut self, element: &'a Element, context: &Arc<Context>, scope: &Scope<'a, '_>) {
        let name = format!("{}{}", scope.prefix, element.name.text);
        if !self.spend(1, name.len(), element.name.span) {
            return;
        }
        if let Some((_, first)) = self.names.get(&name) {
            let error = Diagnostic::new(
                "mason::duplicate-name",
                element.name.span,
                format!("there are two elements of the name `{name}`"),
            );
            self.bag
                .push(error.label(*first, "first here").label_maybe(scope.via, "in the compound made here"));
            return;
        }
        self.names.insert(name.clone(), (Named::Broken, element.name.span));
        self.spoilt = false;
        let mut entries: Vec<Entry> =
            element.settings.iter().map(|setting| self.entry(setting, context, scope)).collect();
        if self.spoilt {
            return;
        }
        let Some((ty, ty_span)) = self.take_type(element, &name, &mut entries) else { return };
        let params = Params { entries, span: element.name.span };
        if let Some((compound, home, outer)) = scope.compound(&ty) {
            self.instance(compound, home, outer, &name, params, scope.depth);
            return;
        }
        self.names.insert(name.clone(), (Named::Element(self.elements.len()), element.name.span));
        // The paper writes `debug.log` for the type `debug_log`.
        let ty = ty.replace('.', "_");
        self.elements.push(ElementSpec {
            name,
            ty,
            ty_span,
            span: element.name.span,
            via: scope.via,
            params,
        });
    }

    /// Takes the one value of the key `type` out of the entries.
    fn take_type(
        &mut self,
        element: &Element,
        name: &str,
        entries: &mut Vec<Entry>,
    ) -> Option<(String, Span)> {
        let Some(at) = entries.iter().position(|entry| entry.key == "type") else {
            let message = format!("element `{name}` has no type");
            let error = Diagnostic::new("mason::missing-type", element.name.span, message);
            self.bag.push(error.help(String::from("add `(type TYPE)`; `mason elements` lists the types")));
            return None;
        };
        let entry = entries.remove(at);
        match entry.values.as_slice() {
            [value] => {
                let twice = entries.iter().find(|entry| entry.key == "type");
                if let Some(second) = twice {
                    let message = format!("element `{name}` has two types");
                    let error = Diagnostic::new("mason::missing-type", second.span, message);
                    self.bag.push(error.label(entry.span, "first here"));
                    return None;
                }
                Some((value.text.clone(), value.span))
            }
            values => {
                let message = format!("element `{name}`: `type` takes one value, found {}", values.len());
                self.bag.push(Diagnostic::new("mason::missing-type", entry.span, message));
                None
            }
        }
    }

    /// Makes the elements of a compound under the name of its instance.
    fn instance(
        &mut self,
        compound: &'a Compound,
        home: Arc<Context>,
        outer: &Scope<'a, '_>,
        name: &str,
        params: Params,
        depth: usize,
    ) {
        if depth >= DEEPEST {
            let message = format!("compounds used within compounds, more than {DEEPEST} deep");
            let error = Diagnostic::new("mason::too-large", params.span, message);
            let help = format!("does `{}` use itself?", compound.name.text);
            self.bag.push(error.label(compound.name.span, "of this compound").help(help));
            self.stopped = true;
            return;
        }
        let via = params.span;
        let prefix = format!("{name}.");
        let bound = self.arguments(compound, &home, outer, name, params);
        let context = Arc::new(Context { folder: home.folder.clone(), scope: prefix.clone() });
        let scope = Scope {
            prefix,
            params: bound,
            compounds: BTreeMap::new(),
            outer: Some(outer),
            via: Some(via),
            depth: depth + 1,
        };
        self.body(&compound.body, context, scope, Some((compound, name)));
    }

    /// Binds the parameters of a compound: given ones, else defaults.
    fn arguments(
        &mut self,
        compound: &'a Compound,
        home: &Arc<Context>,
        outer: &Scope<'a, '_>,
        name: &str,
        params: Params,
    ) -> BTreeMap<String, Bound> {
        self.steps += compound.keys.len();
        let mut bound = BTreeMap::new();
        for entry in params.entries {
            let known = || compound.keys.iter().map(|(key, _)| key.text.as_str());
            if !known().any(|key| key == entry.key) {
                let message = format!(
                    "element `{name}`: compound `{}` has no parameter `{}`",
                    compound.name.text, entry.key
                );
                let near = suggest::did_you_mean(&entry.key, known());
                let help = near.unwrap_or_else(|| format!("it takes {}", suggest::list(known())));
                self.bag.push(Diagnostic::new("mason::unknown-parameter", entry.span, message).help(help));
                continue;
            }
            let origin = entry.values.first().map_or(entry.span, |value| value.span);
            let message = format!("element `{name}`: parameter `{}` is given twice", entry.key);
            if bound.insert(entry.key, Bound { values: entry.values, origin, broken: false }).is_some() {
                self.bag.push(Diagnostic::new("mason::duplicate-parameter", entry.span, message));
            }
        }
        for (key, default) in &compound.keys {
            if bound.contains_key(&key.text) {
                continue;
            }
            let value = match default {
                Some(default) => self.evaluate(default, home, outer, key.span),
                None => {
                    let message = format!(
                        "element `{name}`: compound `{}` needs the parameter `{}`",
                        compound.name.text, key.text
                    );
                    let error = Diagnostic::new("mason::missing-parameter", params.span, message);
                    let help = format!("add `({} ...)`", key.text);
                    self.bag.push(error.label(key.span, "it has no default").help(help));
                    Bound { values: Vec::new(), origin: key.span, broken: true }
                }
            };
            bound.insert(key.text.clone(), value);
        }
        bound
    }

    /// Remembers what the ports of an instance mean.
    fn ports(&mut self, compound: &'a Compound, name: &str, scope: &Scope<'a, '_>) {
        let mut ports: BTreeMap<String, Option<(usize, String)>> = BTreeMap::new();
        for port in &compound.ports {
            if ports.contains_key(&port.port.text) {
                let message = format!("compound `{}` has two ports `{}`", compound.name.text, port.port.text);
                self.bag.push(Diagnostic::new("mason::duplicate-name", port.port.span, message));
                continue;
            }
            let target = self.target(&port.name, &port.inner.text, port.inner.span, &scope.prefix);
            ports.insert(port.port.text.clone(), target);
        }
        if let Some((named, _)) = self.names.get_mut(name) {
            *named = Named::Instance { ty: compound.name.text.clone(), ports };
        }
    }

    /// A in `A -> B -> C` leaves by `out` and enters by `in`, unless a port is named. In the middle a
    /// named port is the one by which the chain leaves; `in` means what it says.
    fn chain(&mut self, ends: &'a [End], prefix: &str) {
        for pair in ends.windows(2) {
            let [from, to] = pair else { continue };
            let middle_from = !std::ptr::eq(from, &ends[0]);
            let middle_to = !std::ptr::eq(to, &ends[ends.len() - 1]);
            let from_port = match &from.port {
                Some(port) if !(middle_from && port.text == "in") => port.text.as_str(),
                _ => "out",
            };
            let to_port = match &to.port {
                Some(port) if !middle_to => port.text.as_str(),
                _ => "in",
            };
            let span = if from.span.source == to.span.source { from.span.to(to.span) } else { from.span };
            let place = |end: &End| end.port.as_ref().map_or(end.span, |port| port.span);
            let upper = self.target(&from.name, from_port, place(from), prefix);
            let lower = self.target(&to.name, to_port, place(to), prefix);
            let (Some((from, from_port)), Some((to, to_port))) = (upper, lower) else { continue };
            if self.spend(1, from_port.len() + to_port.len(), span) {
                self.edges.push(EdgeSpec { from, from_port, to, to_port, span });
            }
        }
    }

    /// The element and port that a name and port mean, through the ports of compounds.
    fn target(&mut self, name: &Name, port: &str, port_span: Span, prefix: &str) -> Option<(usize, String)> {
        let full = format!("{prefix}{}", name.text);
        let error = match self.names.get(&full) {
            Some((Named::Element(index), _)) => return Some((*index, port.to_owned())),
            Some((Named::Broken, _)) => return None,
            Some((Named::Instance { ty, ports }, _)) => match ports.get(port) {
                Some(target) => return target.clone(),
                None if !self.bag.wants("mason::unknown-port", port_span) => return None,
                None => {
                    let message = format!("`{full}` (compound `{ty}`) has no port `{port}`");
                    let known = || ports.keys().map(String::as_str);
                    let near = suggest::did_you_mean(port, known());
                    let help = near.unwrap_or_else(|| format!("its ports: {}", suggest::list(known())));
                    Diagnostic::new("mason::unknown-port", port_span, message).help(help)
                }
            },
            None if !self.bag.wants("mason::unknown-element", name.span) => return None,
            None => {
                let message = format!("there is no element `{full}`");
                let near = self.names.keys().filter_map(|known| known.strip_prefix(prefix));
                let help = suggest::did_you_mean(&name.text, near);
                Diagnostic::new("mason::unknown-element", name.span, message).help(help)
            }
        };
        self.bag.push(error);
        None
    }
}
