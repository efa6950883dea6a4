//! A small table of types, since the framework knows none.

use super::*;
use crate::describe::Carries;

/// A service of the tests.
pub(super) trait DirtyMap {}

impl Service for dyn DirtyMap {
    const NAME: &'static str = "dirty_map";
}

crate::words! {
    /// Operations.
    pub(super) enum Operation {
        Read = "read",
        Write = "write",
        Flush = "flush",
    }
}

crate::params! {
    /// None.
    pub(super) struct Nothing {}
}

crate::params! {
    pub(super) struct File {
        /// The image.
        path: FilePath,
        /// Creates a sparse file of this size when it is missing.
        size: Option<Size>,
        /// Opens with O_DIRECT.
        direct: bool = "no",
    }
}

crate::params! {
    pub(super) struct Nbd {
        /// Where clients connect.
        listen: value::Uri,
        /// The export's name.
        name: Option<String>,
    }
}

crate::params! {
    pub(super) struct DebugLog {
        /// Where to.
        logfile: Option<FilePath>,
    }
}

crate::params! {
    pub(super) struct Filter {
        /// Passes only these.
        keep: Vec<Operation>,
        /// Ranges.
        range: Vec<value::ByteRange>,
        /// How often.
        chance: value::Percent = "100%",
    }
}

crate::params! {
    pub(super) struct Throttle {
        /// Bytes in a second.
        rate: value::Rate,
        /// Requests in a second.
        ops: Option<value::OpsRate>,
        /// Longest wait.
        patience: value::Time = "10s",
        /// How many at once.
        depth: u16 = "32",
    }
}

crate::params! {
    pub(super) struct If {
        /// The dirty map that decides.
        test: Ref<dyn DirtyMap>,
    }
}

fn build(_: &crate::describe::Build<'_>) -> crate::Result<Arc<dyn crate::Element>> {
    Err(crate::Error::internal("the tests build nothing"))
}

const fn ty(
    name: &'static str,
    family: Family,
    ports: Ports,
    params: &'static [Param],
    check: fn(&Params) -> Result<(), Vec<ParamError>>,
) -> ElementType {
    ElementType { name, family, params, ports, check, build, ..ElementType::BASE }
}

const VARIADIC: Ports = Ports { input: true, out: Outs::Variadic { min: 1 } };
const YES_NO: Ports = Ports { input: true, out: Outs::Named(&["yes", "no"]) };

static NBD: ElementType = ty("nbd", Family::Export, Ports::SOURCE, Nbd::PARAMS, Nbd::check);
static FILE: ElementType = ty("file", Family::Sink, Ports::SINK, File::PARAMS, File::check);
static NULL: ElementType = ty("null", Family::Sink, Ports::SINK, Nothing::PARAMS, Nothing::check);
static DEBUG_LOG: ElementType =
    ty("debug_log", Family::Route, Ports::THROUGH, DebugLog::PARAMS, DebugLog::check);
static FILTER: ElementType = ty("filter", Family::Route, YES_NO, Filter::PARAMS, Filter::check);
static THROTTLE: ElementType =
    ty("throttle", Family::Route, Ports::THROUGH, Throttle::PARAMS, Throttle::check);
static TEE: ElementType = ty("tee", Family::Route, VARIADIC, Nothing::PARAMS, Nothing::check);
static LINEAR: ElementType = ty("linear", Family::Route, VARIADIC, Nothing::PARAMS, Nothing::check);
static STRIPE: ElementType = ElementType {
    ports: Ports { input: true, out: Outs::Variadic { min: 2 } },
    ..ty("stripe", Family::Route, VARIADIC, Nothing::PARAMS, Nothing::check)
};
static IF: ElementType =
    ElementType { provides: &["dirty_map"], ..ty("if", Family::Route, YES_NO, If::PARAMS, If::check) };
static LOG_DIRTY: ElementType = ElementType {
    provides: &["dirty_map"],
    ..ty("log_dirty", Family::Route, Ports::THROUGH, Nothing::PARAMS, Nothing::check)
};

static READONLY: ElementType = ElementType {
    carries: |_| Carries::NO_WRITES,
    ..ty("readonly", Family::Route, Ports::THROUGH, Nothing::PARAMS, Nothing::check)
};

pub(super) static CATALOGUE: Catalogue =
    &[&NBD, &FILE, &NULL, &DEBUG_LOG, &FILTER, &THROTTLE, &TEE, &LINEAR, &STRIPE, &IF, &LOG_DIRTY, &READONLY];
