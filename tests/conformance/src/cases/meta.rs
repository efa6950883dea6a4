//! Metadata contexts in the handshake: LIST, SET, wildcards, unknown names, broken lengths.

use super::{Case, reads};
use crate::context::{Context, NO_SUCH_EXPORT};
use crate::haggle::{Answer, Haggle};
use crate::session::{Mode, Request};
use crate::stop::{Check, ensure, skip};
use crate::wire::{Out, cmd, errno, info, meta_data, opt, rep};

/// The one context the specification defines.
pub(super) const ALLOCATION: &str = "base:allocation";
/// A query in a namespace nobody has.
const STRANGE: &str = "x-nbd-conformance:leaf";

pub(super) const CASES: &[Case] = &[
    reads("meta.list-all", "LIST without queries names every context, well-formed", list_all),
    reads("meta.list-query", "LIST of a context names it", list_query),
    reads(
        "meta.list-base-wildcard",
        "LIST of 'base:' names the contexts of the namespace",
        list_base_wildcard,
    ),
    reads("meta.list-unknown-namespace", "LIST ignores an unknown namespace", list_unknown_namespace),
    reads("meta.list-selects-nothing", "LIST leaves the selection as it is", list_selects_nothing),
    reads("meta.list-malformed", "LIST with lengths beyond its data gets ERR_INVALID", list_malformed),
    reads("meta.list-needs-no-extended", "'base:' never gets ERR_EXT_HEADER_REQD", needs_no_extended),
    reads("meta.list-without-chunks", "LIST before structured replies gets an answer", list_without_chunks),
    reads("meta.set-allocation", "SET of a context selects it, with an id and an ACK", set_allocation),
    reads("meta.set-unique-ids", "SET of all contexts gives each an id of its own", set_unique_ids),
    reads("meta.set-twice-in-one", "a context asked for twice is selected once", set_twice_in_one),
    reads("meta.set-base-wildcard", "SET ignores 'base:'", set_base_wildcard),
    reads("meta.set-unknown-leaf", "SET ignores an unknown leaf of 'base:'", set_unknown_leaf),
    reads("meta.set-unknown-namespace", "SET ignores an unknown namespace", set_unknown_namespace),
    reads("meta.set-zero-queries", "SET without queries selects nothing", set_zero_queries),
    reads("meta.set-replaces", "a second SET replaces the selection of the first", set_replaces),
    reads("meta.set-failure-clears", "a SET that fails clears the selection", set_failure_clears),
    reads("meta.set-malformed", "SET with lengths beyond its data gets ERR_INVALID", set_malformed),
    reads("meta.trailing-bytes", "bytes after the last query get ERR_INVALID", trailing_bytes),
    reads("meta.set-without-chunks", "SET before structured replies gets ERR_INVALID", set_without_chunks),
    reads("meta.set-unknown-export", "SET for an unknown export gets an error", set_unknown_export),
    reads("meta.set-other-export", "contexts of one export do not serve another", set_other_export),
];

/// A connection with chunked replies negotiated, on a server with metadata contexts.
fn ready(context: &Context<'_>) -> Check<(Haggle, Mode)> {
    let mode = context.chunked()?;
    if context.facts.contexts.is_empty() {
        return skip("the server lists no metadata contexts");
    }
    let mut haggle = context.haggle()?;
    context.negotiate(&mut haggle, mode)?;
    Ok((haggle, mode))
}

/// As `ready`, on a server with `base:allocation`.
fn ready_base(context: &Context<'_>) -> Check<(Haggle, Mode)> {
    if !context.facts.contexts.iter().any(|name| name == ALLOCATION) {
        return skip("the server does not list base:allocation");
    }
    ready(context)
}

fn ask(context: &Context<'_>, haggle: &mut Haggle, option: u32, queries: &[&str]) -> Check<Answer> {
    haggle.ask(option, &meta_data(context.export(), queries))
}

fn names(answer: &Answer) -> Check<Vec<String>> {
    Ok(answer.contexts()?.into_iter().map(|(_, name)| name).collect())
}

/// The answer to `queries`, which must be an ACK without contexts.
fn ignores(context: &Context<'_>, option: u32, queries: &[&str]) -> Check {
    let (mut haggle, _) = ready(context)?;
    let answer = ask(context, &mut haggle, option, queries)?;
    ensure(answer.last == rep::ACK, || format!("{queries:?} gets {}", rep::name(answer.last)))?;
    let found = names(&answer)?;
    ensure(found.is_empty(), || format!("{queries:?} finds {found:?}"))?;
    haggle.in_step("a query that finds nothing")
}

fn list_all(context: &Context<'_>) -> Check {
    let (mut haggle, _) = ready(context)?;
    let answer = ask(context, &mut haggle, opt::LIST_META, &[])?;
    ensure(answer.last == rep::ACK, || format!("LIST_META_CONTEXT gets {}", rep::name(answer.last)))?;
    for (id, name) in answer.contexts()? {
        let Some((namespace, _)) = name.split_once(':') else {
            return crate::stop::fail(format!("the context '{name}' has no namespace"));
        };
        let printable = |c: char| !c.is_whitespace() && !c.is_control();
        let plain = !namespace.is_empty() && namespace.chars().all(printable);
        ensure(plain, || format!("the namespace of '{name}' is not printable"))?;
        let registered = ["base", "nbd-server", "qemu"].contains(&namespace) || namespace.starts_with("x-");
        ensure(registered, || format!("the namespace of '{name}' is not registered"))?;
        context.should(id == 0, || format!("LIST gives '{name}' the id {id}, which is reserved"));
    }
    Ok(())
}

fn list_query(context: &Context<'_>) -> Check {
    let (mut haggle, _) = ready_base(context)?;
    let answer = ask(context, &mut haggle, opt::LIST_META, &[ALLOCATION])?;
    let found = names(&answer)?;
    ensure(found == [ALLOCATION], || format!("LIST of base:allocation finds {found:?}"))
}

fn list_base_wildcard(context: &Context<'_>) -> Check {
    let (mut haggle, _) = ready_base(context)?;
    let answer = ask(context, &mut haggle, opt::LIST_META, &["base:"])?;
    ensure(answer.last == rep::ACK, || format!("LIST of 'base:' gets {}", rep::name(answer.last)))?;
    let found = names(&answer)?;
    ensure(found.iter().any(|name| name == ALLOCATION), || format!("LIST of 'base:' finds {found:?}"))?;
    ensure(found.iter().all(|name| name.starts_with("base:")), || format!("LIST of 'base:' finds {found:?}"))
}

fn list_unknown_namespace(context: &Context<'_>) -> Check {
    ignores(context, opt::LIST_META, &[STRANGE])?;
    ignores(context, opt::LIST_META, &[STRANGE, "x-other:", "x-third:a:b"])
}

fn list_selects_nothing(context: &Context<'_>) -> Check {
    let (mut haggle, mode) = ready_base(context)?;
    let contexts = context.select(&mut haggle, &[ALLOCATION])?;
    ask(context, &mut haggle, opt::LIST_META, &[STRANGE])?;
    let mut session = context.go(haggle, mode)?;
    session.contexts = contexts;
    let len = session.unit().min(session.size);
    session.works(Request::new(cmd::BLOCK_STATUS, 0, len)).map(|_| ())
}

/// Data of meta context options whose lengths do not fit.
fn malformed(export: &str) -> Vec<(&'static str, Vec<u8>)> {
    let named = || Out::new().string(export);
    vec![
        ("no data", vec![]),
        ("an export name beyond the data", Out::new().u32(100).bytes(b"short").done()),
        ("an export name of 4 GiB", Out::new().u32(u32::MAX).u32(0).done()),
        ("no query count", named().done()),
        ("a query count without queries", named().u32(1).done()),
        ("4 Gi queries announced", named().u32(u32::MAX).string(ALLOCATION).done()),
        ("a query beyond the data", named().u32(1).u32(16).bytes(ALLOCATION.as_bytes()).done()),
        ("a query of 4 GiB", named().u32(1).u32(u32::MAX).bytes(ALLOCATION.as_bytes()).done()),
        ("one query less than announced", named().u32(2).string(ALLOCATION).done()),
    ]
}

fn list_malformed(context: &Context<'_>) -> Check {
    for (what, data) in malformed(context.export()) {
        let (mut haggle, _) = ready(context)?;
        let last = haggle.ask(opt::LIST_META, &data)?.last;
        ensure(last == rep::ERR_INVALID, || format!("{what} gets {}", rep::name(last)))?;
        haggle.in_step(what)?;
    }
    Ok(())
}

fn set_malformed(context: &Context<'_>) -> Check {
    for (what, data) in malformed(context.export()) {
        let (mut haggle, _) = ready(context)?;
        let last = haggle.ask(opt::SET_META, &data)?.last;
        ensure(last & rep::ERROR_BIT != 0, || format!("{what} gets {}", rep::name(last)))?;
        context.should(last == rep::ERR_INVALID, || format!("SET with {what} gets {}", rep::name(last)));
        haggle.in_step(what)?;
    }
    Ok(())
}

/// The specification names no such case, but data nobody can explain is no valid request.
fn trailing_bytes(context: &Context<'_>) -> Check {
    let data = Out::new().string(context.export()).u32(1).string(ALLOCATION).bytes(b"tail").done();
    for option in [opt::LIST_META, opt::SET_META] {
        let (mut haggle, _) = ready(context)?;
        let last = haggle.ask(option, &data)?.last;
        context.should(last == rep::ERR_INVALID, || {
            format!("option {option} with bytes after the last query gets {}", rep::name(last))
        });
        haggle.in_step("bytes after the last query")?;
    }
    Ok(())
}

fn needs_no_extended(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    context.negotiate(&mut haggle, Mode::Structured)?;
    for option in [opt::LIST_META, opt::SET_META] {
        for query in ["base:", ALLOCATION] {
            let last = ask(context, &mut haggle, option, &[query])?.last;
            ensure(last != rep::ERR_EXT_HEADER_REQD, || format!("'{query}' gets ERR_EXT_HEADER_REQD"))?;
        }
    }
    Ok(())
}

fn list_without_chunks(context: &Context<'_>) -> Check {
    let mut haggle = context.haggle()?;
    ask(context, &mut haggle, opt::LIST_META, &[])?;
    haggle.in_step("LIST_META_CONTEXT")
}

fn set_allocation(context: &Context<'_>) -> Check {
    let (mut haggle, _) = ready_base(context)?;
    let answer = ask(context, &mut haggle, opt::SET_META, &[ALLOCATION])?;
    ensure(answer.last == rep::ACK, || format!("SET gets {}", rep::name(answer.last)))?;
    let found = names(&answer)?;
    ensure(found == [ALLOCATION], || format!("SET of base:allocation selects {found:?}"))
}

fn set_unique_ids(context: &Context<'_>) -> Check {
    let (mut haggle, _) = ready(context)?;
    let all: Vec<_> = context.facts.contexts.iter().map(String::as_str).collect();
    let answer = ask(context, &mut haggle, opt::SET_META, &all)?;
    if answer.last == rep::ERR_TOO_BIG {
        return skip("the server does not select all of its contexts at once");
    }
    ensure(answer.last == rep::ACK, || format!("SET of {all:?} gets {}", rep::name(answer.last)))?;
    unique(&answer)
}

fn unique(answer: &Answer) -> Check {
    let found = answer.contexts()?;
    let mut ids: Vec<_> = found.iter().map(|(id, _)| *id).collect();
    ids.sort_unstable();
    ids.dedup();
    ensure(ids.len() == found.len(), || format!("two contexts share an id: {found:?}"))
}

fn set_twice_in_one(context: &Context<'_>) -> Check {
    let (mut haggle, _) = ready_base(context)?;
    let answer = ask(context, &mut haggle, opt::SET_META, &[ALLOCATION, ALLOCATION])?;
    if answer.last != rep::ACK {
        let allowed = [rep::ERR_TOO_BIG, rep::ERR_INVALID].contains(&answer.last);
        return ensure(allowed, || format!("SET gets {}", rep::name(answer.last)));
    }
    unique(&answer)?;
    let found = names(&answer)?;
    ensure(found == [ALLOCATION], || format!("base:allocation twice selects {found:?}"))
}

fn set_base_wildcard(context: &Context<'_>) -> Check {
    ignores(context, opt::SET_META, &["base:"])
}

fn set_unknown_leaf(context: &Context<'_>) -> Check {
    ignores(context, opt::SET_META, &["base:no-such-leaf"])?;
    let (mut haggle, _) = ready_base(context)?;
    let answer = ask(context, &mut haggle, opt::SET_META, &["base:no-such-leaf", ALLOCATION])?;
    let found = names(&answer)?;
    ensure(answer.last == rep::ACK && found == [ALLOCATION], || {
        format!("an unknown leaf beside base:allocation selects {found:?}, {}", rep::name(answer.last))
    })
}

fn set_unknown_namespace(context: &Context<'_>) -> Check {
    ignores(context, opt::SET_META, &[STRANGE])
}

fn set_zero_queries(context: &Context<'_>) -> Check {
    ignores(context, opt::SET_META, &[])
}

/// After `base:allocation` and then `second`, no context is selected: BLOCK_STATUS gets EINVAL.
fn cleared_by(context: &Context<'_>, option: u32, second: &[u8], what: &str) -> Check {
    let (mut haggle, mode) = ready_base(context)?;
    context.select(&mut haggle, &[ALLOCATION])?;
    haggle.ask(option, second)?;
    let mut session = context.go(haggle, mode)?;
    let len = session.unit().min(session.size);
    let request = Request::new(cmd::BLOCK_STATUS, 0, len);
    // The session knows of no context, so a status chunk would fail the test here.
    session.refuses_in_step(request, &[errno::EINVAL]).map_err(|stop| match stop {
        crate::stop::Stop::Fail(text) => crate::stop::Stop::Fail(format!("after {what}: {text}")),
        other => other,
    })
}

fn set_replaces(context: &Context<'_>) -> Check {
    let data = meta_data(context.export(), &[STRANGE]);
    cleared_by(context, opt::SET_META, &data, "SET of a context and SET of an unknown one")?;
    let data = meta_data(context.export(), &[]);
    cleared_by(context, opt::SET_META, &data, "SET of a context and SET of none")
}

fn set_failure_clears(context: &Context<'_>) -> Check {
    let data = Out::new().string(context.export()).u32(9).done();
    cleared_by(context, opt::SET_META, &data, "SET of a context and a broken SET")
}

fn set_without_chunks(context: &Context<'_>) -> Check {
    ready_base(context)?;
    let mut haggle = context.haggle()?;
    let last = ask(context, &mut haggle, opt::SET_META, &[ALLOCATION])?.last;
    let refused = [rep::ERR_INVALID, rep::ERR_EXT_HEADER_REQD].contains(&last);
    context.should(refused, || format!("SET before structured replies gets {}", rep::name(last)));
    haggle.in_step("SET before structured replies")
}

fn set_unknown_export(context: &Context<'_>) -> Check {
    context.needs_unknown_name()?;
    for option in [opt::LIST_META, opt::SET_META] {
        let (mut haggle, _) = ready(context)?;
        let last = haggle.ask(option, &meta_data(NO_SUCH_EXPORT, &[ALLOCATION]))?.last;
        let fits = [rep::ERR_UNKNOWN, rep::ERR_TLS_REQD].contains(&last);
        context.should(fits, || format!("option {option} for an unknown export gets {}", rep::name(last)));
        haggle.in_step("an unknown export")?;
    }
    Ok(())
}

fn set_other_export(context: &Context<'_>) -> Check {
    let Some(other) = context.facts.exports.iter().find(|name| name.as_str() != context.export()) else {
        return skip("the server lists no second export");
    };
    let (mut haggle, mode) = ready_base(context)?;
    context.select(&mut haggle, &[ALLOCATION])?;
    let (last, info) = haggle.info(opt::GO, other, &[info::BLOCK_SIZE])?;
    if last != rep::ACK {
        return skip("the second export does not open");
    }
    let mut session = context.enter(haggle, mode, &info)?;
    let len = session.unit().min(session.size);
    session.refuses_in_step(Request::new(cmd::BLOCK_STATUS, 0, len), &[errno::EINVAL])
}
