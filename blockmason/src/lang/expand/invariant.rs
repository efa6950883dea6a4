//! What the names of an invariant mean.

use super::super::ast::{Invariant as Written, Which};
use super::super::diag::Diagnostic;
use super::super::params::Context;
use super::super::spec::{Group, Invariant, What};
use super::super::suggest;
use super::{Expander, Named, Scope};
use std::sync::Arc;

/// Invariants of one graph.
const MOST: usize = 10_000;

impl<'a> Expander<'a> {
    /// Adds an invariant, unless what it names could not be made; an error says so already.
    pub(super) fn invariant(&mut self, written: &'a Written, context: &Arc<Context>, scope: &Scope<'a, '_>) {
        let sentence = self.value(&written.sentence, context, scope).pop();
        if self.invariants.len() >= MOST {
            let message = format!("the graph has more than {MOST} invariants");
            self.bag.push(Diagnostic::new("mason::too-large", written.span, message));
            self.stopped = true;
            return;
        }
        let (from, to) = (self.group(&written.from, scope), self.group(&written.to, scope));
        let passes: Option<Vec<Group>> =
            written.passes.iter().map(|which| self.group(which, scope)).collect();
        let (Some(sentence), Some(from), Some(to), Some(passes)) = (sentence, from, to, passes) else {
            return;
        };
        let names = [&from, &to].into_iter().chain(&passes).map(|group| group.span.len as usize).sum();
        if self.spend(1, names, written.span) {
            self.invariants.push(Invariant {
                sentence: sentence.text,
                every: written.every,
                paths: written.paths,
                from,
                to,
                passes,
                span: written.span,
                via: scope.via,
                scope: scope.prefix.clone(),
            });
        }
    }

    /// An element of the scope; a name that none has is for the checker, which knows the types.
    fn group(&mut self, which: &Which, scope: &Scope<'a, '_>) -> Option<Group> {
        let (text, span) = (&which.name.text, which.name.span);
        let full = format!("{}{text}", scope.prefix);
        let found = self.names.get(&full).filter(|_| !which.any);
        let what = match found {
            None => What::Any(text.replace('.', "_")),
            Some((Named::Element(index), _)) => What::Element(*index),
            Some((Named::Broken, _)) => return None,
            Some((Named::Instance { ty, .. }, _)) => {
                let message = format!("`{full}` is a compound (`{ty}`), an invariant names elements");
                let error = Diagnostic::new("mason::invariant", span, message);
                let dotted = format!("{full}.");
                let mut inner: Vec<&str> = self
                    .elements
                    .iter()
                    .map(|e| e.name.as_str())
                    .filter(|n| n.starts_with(&dotted))
                    .collect();
                inner.truncate(5);
                let help = format!("name one of its elements, such as {}", suggest::list(inner));
                self.bag.push(error.help(help));
                return None;
            }
        };
        Some(Group { what, span })
    }
}
