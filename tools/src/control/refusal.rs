//! Why something was not done, in the one shape that both ends of the control socket share.

use crate::failure::{Failure, sentence, sentence_in};
use crate::output::printable_lines;
use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use blockmason::Error;
use blockmason::lang::{Diagnostics, Spec};
use serde::{Deserialize, Serialize};
use std::fmt::Display;
use utoipa::ToSchema;

/// What every answer is that says no.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct RefusalBody {
    pub(crate) error: Refusal,
}

/// Why something was not done.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct Refusal {
    /// What to do about it: `invalid`, `unsupported`, `denied`, `no_space`, `busy`, `unavailable`, `io`,
    /// `internal`, `not_found`, `too_large`, `too_slow`, `too_many`.
    pub(crate) kind: String,
    /// One sentence for people; it names element and place too.
    pub(crate) message: String,
    /// The element it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) element: Option<String>,
    /// Where that stands: `vm1.mason:3:9`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) place: Option<String>,
}

impl Refusal {
    /// A refusal of one of the kinds above.
    pub(crate) fn new(kind: &str, message: impl Display) -> Refusal {
        Refusal { kind: kind.to_owned(), message: message.to_string(), element: None, place: None }
    }

    /// The request makes no sense as it is.
    pub(crate) fn invalid(message: impl Display) -> Refusal {
        Refusal::new("invalid", message)
    }

    /// What it names is not there.
    pub(crate) fn not_found(message: impl Display) -> Refusal {
        Refusal::new("not_found", message)
    }

    /// What it names is in somebody else's hands.
    pub(crate) fn busy(message: impl Display) -> Refusal {
        Refusal::new("busy", message)
    }

    /// An error of the framework.
    pub(crate) fn of(error: &Error) -> Refusal {
        let element = error.element().map(str::to_owned);
        Refusal { element, ..Refusal::new(error.kind().name(), sentence(error)) }
    }

    /// An error of a graph, with the place of the element that it names.
    pub(crate) fn in_graph(error: &Error, spec: &Spec) -> Refusal {
        // While a graph is built, elements are named with their place.
        let element = error.element().map(|name| name.split_once(" (").map_or(name, |(name, _)| name));
        let place = element.and_then(|name| Some(spec.place(&spec.elements[spec.find(name)?]).to_string()));
        let element = element.map(str::to_owned);
        Refusal { element, place, ..Refusal::new(error.kind().name(), sentence_in(error, spec)) }
    }

    /// A graph file that is not good: its first error, and how many more there are.
    pub(crate) fn graph(diagnostics: &Diagnostics) -> Refusal {
        let place = diagnostics.iter().next().map(|first| diagnostics.place(first).to_string());
        let more = match diagnostics.count() {
            0 | 1 => String::new(),
            count => format!(", and {} more errors", count - 1),
        };
        Refusal { place, ..Refusal::invalid(format!("{}{more}", diagnostics.first_line())) }
    }

    fn status(&self) -> StatusCode {
        match self.kind.as_str() {
            "invalid" | "unsupported" => StatusCode::BAD_REQUEST,
            "denied" => StatusCode::FORBIDDEN,
            "not_found" => StatusCode::NOT_FOUND,
            "busy" => StatusCode::CONFLICT,
            "too_large" => StatusCode::PAYLOAD_TOO_LARGE,
            "too_slow" => StatusCode::REQUEST_TIMEOUT,
            "unavailable" | "too_many" => StatusCode::SERVICE_UNAVAILABLE,
            "no_space" => StatusCode::INSUFFICIENT_STORAGE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status(), Json(RefusalBody { error: self })).into_response()
    }
}

/// As a command says it. A daemon's words are not to be trusted with a terminal.
impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Failure {
        Failure::new(printable_lines(&refusal.message))
    }
}
