//! The handlers of a running graph's elements: those of their types, and those that all of them have.

use super::{Graph, Moved, Node};
use crate::describe::{Access, ElementType, Handler};
use crate::error::{Error, Result};
use crate::lang::did_you_mean;
use crate::lang::value::Time;
use crate::request::Op;
use crate::sched::contained;
use std::time::Duration;

/// What every element can be asked. A type's own handler of the same name comes before it.
pub const COMMON: &[Handler] = &[
    Handler { name: "requests", access: Access::Read, doc: "requests that have come to it" },
    Handler { name: "bytes", access: Access::Read, doc: "bytes that these have read and written" },
];

/// What an element where requests enter a graph can be asked as well.
pub const SOURCE: &[Handler] = &[
    Handler { name: "errors", access: Access::Read, doc: "requests that were answered with an error" },
    Handler { name: "latency_p50", access: Access::Read, doc: "time that half of the requests took at most" },
    Handler { name: "latency_p99", access: Access::Read, doc: "time that 99 % of the requests took at most" },
    Handler { name: "latency_max", access: Access::Read, doc: "time that the slowest request took" },
];

impl ElementType {
    /// Every handler that an element of this type has, its own before the common ones.
    pub fn all_handlers(&self) -> impl Iterator<Item = &'static Handler> + Clone {
        let own: &'static [Handler] = self.handlers;
        let source = if self.ports.input { &[] } else { SOURCE };
        let known = |handler: &&Handler| own.iter().all(|other| other.name != handler.name);
        own.iter().chain(COMMON.iter().chain(source).filter(known))
    }
}

/// A handler of an element of a running graph.
pub struct HandlerReading<'a> {
    /// The element.
    pub element: &'a str,
    /// The handler.
    pub handler: &'static Handler,
    /// Its value; None of one that can only be called.
    pub value: Option<Result<String>>,
}

/// What somebody wants of a handler.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wish {
    Get,
    Set,
    Call,
}

impl Wish {
    fn is_granted(self, access: Access) -> bool {
        match access {
            Access::Read => self == Wish::Get,
            Access::ReadWrite => self != Wish::Call,
            Access::Call => self == Wish::Call,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Wish::Get => "read",
            Wish::Set => "set",
            Wish::Call => "called",
        }
    }
}

impl Graph {
    /// The value of a handler.
    ///
    /// # Errors
    /// No such element or handler, or it cannot be read; what the element says.
    pub fn get(&self, element: &str, handler: &str) -> Result<String> {
        let (ix, node, own) = self.handler(element, handler, Wish::Get)?;
        if own {
            return contained(|| node.element.get(handler)).map_err(|error| error.in_element(element));
        }
        self.common(ix, handler, &self.arrived()[ix])
    }

    /// Every handler of every element, in the order of the graph file, with its value if it can be read.
    pub fn readings(&self) -> Vec<HandlerReading<'_>> {
        let arrived = self.arrived();
        let value = |ix: usize, handler: &Handler| {
            let node = &self.nodes[ix];
            match handler.access {
                Access::Call => None,
                _ if is_own(node.instance.ty, handler.name) => {
                    Some(contained(|| node.element.get(handler.name)))
                }
                _ => Some(self.common(ix, handler.name, &arrived[ix])),
            }
        };
        let mut readings = Vec::new();
        for (ix, instance) in self.instances().enumerate() {
            for handler in instance.ty.all_handlers() {
                let value = value(ix, handler);
                readings.push(HandlerReading { element: &instance.name, handler, value });
            }
        }
        readings
    }

    /// Sets a handler.
    ///
    /// # Errors
    /// No such element or handler, or it cannot be set; what the element says of the value.
    pub fn set(&self, element: &str, handler: &str, value: &str) -> Result<()> {
        let (_, node, _) = self.handler(element, handler, Wish::Set)?;
        contained(|| node.element.set(handler, value)).map_err(|error| told(error, element, handler))
    }

    /// Calls a handler.
    ///
    /// # Errors
    /// No such element or handler, or it cannot be called; what the element says.
    pub fn call(&self, element: &str, handler: &str, argument: &str) -> Result<String> {
        let (_, node, _) = self.handler(element, handler, Wish::Call)?;
        contained(|| node.element.call(handler, argument)).map_err(|error| told(error, element, handler))
    }

    /// The element, and whether the handler is its type's own.
    fn handler(&self, element: &str, name: &str, wish: Wish) -> Result<(usize, &Node, bool)> {
        let Some(ix) = self.node(element) else {
            let names = self.instances().map(|instance| instance.name.as_str());
            let message = format!("there is no element {element}{}", hint(did_you_mean(element, names)));
            return Err(Error::invalid(message));
        };
        let node = &self.nodes[ix];
        let ty = node.instance.ty;
        let Some(found) = ty.all_handlers().find(|handler| handler.name == name) else {
            let names = ty.all_handlers().map(|handler| handler.name);
            let hint = did_you_mean(name, names.clone()).unwrap_or_else(|| {
                format!("the type {} has: {}", ty.name, names.collect::<Vec<_>>().join(", "))
            });
            return Err(Error::invalid(format!("{element} has no handler {name}; {hint}")));
        };
        if !wish.is_granted(found.access) {
            let can = match found.access {
                Access::Read => "read",
                Access::ReadWrite => "read and set",
                Access::Call => "called",
            };
            return Err(Error::invalid(format!("{element}.{name} can be {can}, not {}", wish.word())));
        }
        Ok((ix, node, is_own(ty, name)))
    }

    /// The value of a handler that the framework answers.
    fn common(&self, node: usize, handler: &str, arrived: &[Moved; Op::ALL.len()]) -> Result<String> {
        match handler {
            "requests" => return Ok(arrived.iter().map(|op| op.requests).sum::<u64>().to_string()),
            "bytes" => return Ok(arrived.iter().map(|op| op.bytes).sum::<u64>().to_string()),
            _ => {}
        }
        let sum = self.read_source(node).sum();
        let time = |q| Ok(Time(Duration::from_nanos(sum.quantile_ns(q))).to_string());
        match handler {
            "errors" => Ok(sum.errors.to_string()),
            "latency_p50" => time(0.5),
            "latency_p99" => time(0.99),
            "latency_max" => time(1.0),
            _ => Err(Error::no_handler(handler)),
        }
    }
}

/// True if a type answers a handler itself.
fn is_own(ty: &ElementType, name: &str) -> bool {
    ty.handlers.iter().any(|handler| handler.name == name)
}

fn hint(hint: Option<String>) -> String {
    hint.map_or_else(String::new, |hint| format!("; {hint}"))
}

/// What an element says of a value, with its name and the handler's.
fn told(error: Error, element: &str, handler: &str) -> Error {
    error.in_element(&format!("{element}.{handler}"))
}
