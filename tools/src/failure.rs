//! What makes a command exit with something else than 0.

use blockmason::Error;
use blockmason::lang::Spec;
use std::fmt::Display;
use std::process::ExitCode;

/// Why a command did not do what it was asked to.
pub(crate) enum Failure {
    /// It could not be done: one sentence, exit code 1.
    Failed(String),
    /// It was asked for in the wrong way: one sentence, exit code 2.
    Usage(String),
    /// It could not be done and everything has been said: exit code 1.
    Said,
}

/// What a command returns.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    /// It could not be done, for this reason.
    pub(crate) fn new(sentence: impl Display) -> Failure {
        Failure::Failed(sentence.to_string())
    }

    /// An error of the framework, with what the system said.
    pub(crate) fn from_error(error: &Error) -> Failure {
        Failure::Failed(sentence(error))
    }

    /// An error while a graph was built or started, with the place of the element it names.
    pub(crate) fn in_graph(error: &Error, spec: &Spec) -> Failure {
        Failure::Failed(sentence_in(error, spec))
    }

    /// Says it on stderr and gives the exit code.
    pub(crate) fn report(self) -> ExitCode {
        match self {
            Failure::Failed(sentence) => {
                eprintln!("mason: {sentence}");
                ExitCode::from(1)
            }
            Failure::Usage(sentence) => {
                eprintln!("mason: {sentence}");
                ExitCode::from(2)
            }
            Failure::Said => ExitCode::from(1),
        }
    }
}

/// The error and its cause in one line, with the place of the element it names.
pub(crate) fn sentence_in(error: &Error, spec: &Spec) -> String {
    let text = sentence(error);
    let found = error.element().and_then(|name| Some((name, &spec.elements[spec.find(name)?])));
    match found {
        Some((name, element)) => {
            let rest = text.strip_prefix(name).unwrap_or(&text);
            format!("{name} ({}){rest}", spec.place(element))
        }
        None => text,
    }
}

/// The error and its cause in one line.
pub(crate) fn sentence(error: &Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::Failed(sentence) | Failure::Usage(sentence) => f.write_str(sentence),
            Failure::Said => f.write_str("it failed"),
        }
    }
}
