//! `NBD_OPT_INFO` and `NBD_OPT_GO`: items, order, block sizes, unknown exports, broken requests.

use super::{Case, reads};
use crate::context::{Context, NO_SUCH_EXPORT};
use crate::haggle::{Blocks, Haggle};
use crate::session::{Mode, Session};
use crate::stop::{Check, ensure, skip};
use crate::wire::{Out, STRING_MAX, handshake, info, info_data, opt, rep};

/// An information type no version of the protocol has given a meaning.
const UNKNOWN_INFO: u16 = 0x7ace;
const ALL: [u16; 4] = [info::BLOCK_SIZE, info::NAME, info::DESCRIPTION, info::EXPORT];

pub(super) const CASES: &[Case] = &[
    reads("info.baseline", "the server has INFO and GO", baseline),
    reads("info.export-item", "INFO succeeds with one INFO_EXPORT of 12 bytes", export_item),
    reads("info.keeps-haggling", "after INFO the server takes more options", keeps_haggling),
    reads("info.all-items", "items asked for are well-formed and come once", all_items),
    reads("info.unknown-request", "an unknown information request is ignored", unknown_request),
    reads("info.block-sizes", "advertised size constraints keep the rules for their values", block_sizes),
    reads("info.block-size-not-reqd", "a client that asked for block sizes is not sent for them", not_reqd),
    reads(
        "info.without-block-size",
        "a client that did not ask for block sizes is let in",
        without_block_size,
    ),
    reads("info.unknown-export", "INFO of an unknown export gets ERR_UNKNOWN", unknown_export),
    reads("info.name-overrun", "a name length beyond the data gets ERR_INVALID", name_overrun),
    reads(
        "info.count-mismatch",
        "a request count that does not fit the data gets ERR_INVALID",
        count_mismatch,
    ),
    reads("info.empty", "INFO without data gets ERR_INVALID", empty),
    reads("info.long-name", "a name over 4096 bytes gets an error", long_name),
    reads("go.same-as-info", "GO repeats what INFO said", same_as_info),
    reads("go.no-padding", "no zeroes follow the ACK of GO", no_padding),
    reads("go.unknown-export", "after GO of an unknown export the right one still opens", go_unknown_export),
    reads("go.broken-then-good", "after a broken GO a good one works", broken_then_good),
];

fn baseline(context: &Context<'_>) -> Check {
    ensure(context.facts.go, || "GO gets ERR_UNSUP".into())
}

fn ready(context: &Context<'_>) -> Check<Haggle> {
    context.needs_go()?;
    context.haggle()
}

fn export_item(context: &Context<'_>) -> Check {
    let (last, info) = ready(context)?.info(opt::INFO, context.export(), &[])?;
    ensure(last == rep::ACK, || format!("INFO gets {}", rep::name(last)))?;
    ensure(info.kinds.contains(&info::EXPORT), || "INFO without INFO_EXPORT".into())
}

fn keeps_haggling(context: &Context<'_>) -> Check {
    let mut haggle = ready(context)?;
    for _ in 0..3 {
        haggle.info(opt::INFO, context.export(), &[])?;
        haggle.in_step("INFO")?;
    }
    Ok(())
}

fn all_items(context: &Context<'_>) -> Check {
    let (last, info) = ready(context)?.info(opt::INFO, context.export(), &ALL)?;
    ensure(last == rep::ACK, || format!("INFO gets {}", rep::name(last)))?;
    let mut kinds = info.kinds.clone();
    kinds.sort_unstable();
    kinds.dedup();
    context.should(kinds.len() == info.kinds.len(), || format!("items come twice: {:?}", info.kinds));
    if let Some(name) = info.name {
        let known = context.facts.exports.iter().any(|export| export.as_bytes() == name);
        let text = String::from_utf8_lossy(&name).into_owned();
        context.should(known || context.facts.exports.is_empty(), || {
            format!("INFO_NAME '{text}' is not in LIST")
        });
    }
    Ok(())
}

fn unknown_request(context: &Context<'_>) -> Check {
    let mut haggle = ready(context)?;
    let (last, _) = haggle.info(opt::INFO, context.export(), &[UNKNOWN_INFO, info::BLOCK_SIZE])?;
    ensure(last == rep::ACK, || format!("INFO with an unknown request gets {}", rep::name(last)))?;
    let (last, _) = haggle.info(opt::GO, context.export(), &[UNKNOWN_INFO, info::BLOCK_SIZE])?;
    ensure(last == rep::ACK, || format!("GO with an unknown request gets {}", rep::name(last)))
}

fn block_sizes(context: &Context<'_>) -> Check {
    let (_, info) = ready(context)?.info(opt::INFO, context.export(), &[info::BLOCK_SIZE])?;
    let Some(Blocks { minimum, preferred, maximum }) = info.blocks else {
        return skip("the server advertises no size constraints");
    };
    ensure(minimum.is_power_of_two(), || format!("the minimum {minimum} is no power of two"))?;
    ensure(minimum <= 65536, || format!("the minimum {minimum} is over 65536"))?;
    ensure(preferred.is_power_of_two(), || format!("the preferred size {preferred} is no power of two"))?;
    ensure(preferred >= minimum.max(512), || format!("preferred {preferred}, minimum {minimum}"))?;
    ensure(maximum >= preferred, || format!("maximum {maximum}, preferred {preferred}"))?;
    let size = context.facts.size;
    context.should(size.is_multiple_of(u64::from(minimum)), || {
        format!("the size {size} is no multiple of the minimum {minimum}")
    });
    context
        .should(u64::from(maximum) >= size.min(1 << 20), || format!("the maximum {maximum} is under 1 MiB"));
    Ok(())
}

fn not_reqd(context: &Context<'_>) -> Check {
    let mut haggle = ready(context)?;
    for option in [opt::INFO, opt::GO] {
        let (last, _) = haggle.info(option, context.export(), &[info::BLOCK_SIZE])?;
        ensure(last != rep::ERR_BLOCK_SIZE_REQD, || format!("option {option} gets ERR_BLOCK_SIZE_REQD"))?;
    }
    Ok(())
}

fn without_block_size(context: &Context<'_>) -> Check {
    let mut haggle = ready(context)?;
    let (last, info) = haggle.info(opt::GO, context.export(), &[])?;
    if last == rep::ERR_BLOCK_SIZE_REQD {
        context.should(info.blocks.is_some(), || "ERR_BLOCK_SIZE_REQD without the block sizes".into());
        let default = context.facts.blocks.is_some_and(|blocks| blocks.minimum == 1);
        context.should(!default, || "ERR_BLOCK_SIZE_REQD although the sizes are the defaults".into());
        return haggle.in_step("ERR_BLOCK_SIZE_REQD");
    }
    ensure(last == rep::ACK, || format!("GO gets {}", rep::name(last)))?;
    let mut session = context.enter(haggle, Mode::Simple, &info)?;
    session.blocks = context.facts.blocks;
    session.in_step("GO")
}

fn unknown_export(context: &Context<'_>) -> Check {
    context.needs_unknown_name()?;
    let mut haggle = ready(context)?;
    let (last, info) = haggle.info(opt::INFO, NO_SUCH_EXPORT, &[])?;
    ensure(last & rep::ERROR_BIT != 0, || format!("INFO of an unknown export gets {}", rep::name(last)))?;
    let fits = [rep::ERR_UNKNOWN, rep::ERR_TLS_REQD, rep::ERR_POLICY].contains(&last);
    ensure(fits, || format!("INFO of an unknown export gets {}", rep::name(last)))?;
    context.should(info.kinds.is_empty(), || "INFO of an unknown export gets items".into());
    haggle.in_step("INFO of an unknown export")
}

/// Sends broken data with INFO and GO: an error, best ERR_INVALID, and the stream in step.
fn broken(context: &Context<'_>, data: &[u8], what: &str) -> Check {
    let mut haggle = ready(context)?;
    for option in [opt::INFO, opt::GO] {
        let last = haggle.ask(option, data)?.last;
        ensure(last & rep::ERROR_BIT != 0, || {
            format!("option {option} with {what} gets {}", rep::name(last))
        })?;
        context.should(last == rep::ERR_INVALID, || {
            format!("option {option} with {what} gets {}", rep::name(last))
        });
        haggle.in_step(what)?;
    }
    Ok(())
}

fn name_overrun(context: &Context<'_>) -> Check {
    let data = |claimed: u32| Out::new().u32(claimed).bytes(b"name").u16(0).done();
    broken(context, &data(5), "a name one byte too long")?;
    broken(context, &data(u32::MAX), "a name of 4 GiB")
}

fn count_mismatch(context: &Context<'_>) -> Check {
    let data = |count: u16, tail: &[u8]| Out::new().string(context.export()).u16(count).bytes(tail).done();
    broken(context, &data(2, &[0, 3]), "two requests announced and one sent")?;
    broken(context, &data(u16::MAX, &[]), "65535 requests announced and none sent")?;
    broken(context, &data(0, &[0, 3, 0, 1]), "two requests more than announced")?;
    broken(context, &data(1, &[0, 3, 0]), "half a request too many")
}

fn empty(context: &Context<'_>) -> Check {
    broken(context, &[], "no data")?;
    broken(context, &[0, 0, 0], "three bytes of data")
}

fn long_name(context: &Context<'_>) -> Check {
    context.needs_unknown_name()?;
    let mut haggle = ready(context)?;
    let name = "x".repeat(STRING_MAX + 1);
    let last = haggle.ask(opt::INFO, &info_data(&name, &[]))?.last;
    ensure(last & rep::ERROR_BIT != 0, || format!("a name of 4097 bytes gets {}", rep::name(last)))?;
    haggle.in_step("a name of 4097 bytes")
}

fn same_as_info(context: &Context<'_>) -> Check {
    for mode in context.modes() {
        let mut haggle = ready(context)?;
        context.negotiate(&mut haggle, mode)?;
        let (first, mut asked) = haggle.info(opt::INFO, context.export(), &ALL)?;
        let (second, mut gone) = haggle.info(opt::GO, context.export(), &ALL)?;
        asked.kinds.sort_unstable();
        gone.kinds.sort_unstable();
        let said = |what: &str| format!("in {mode:?} mode INFO and GO differ in {what}");
        ensure(first == second, || said("their end"))?;
        ensure(asked.export == gone.export, || {
            format!("{}: {:x?} and {:x?}", said("size or flags"), asked.export, gone.export)
        })?;
        ensure(asked.blocks == gone.blocks, || said("the block sizes"))?;
        ensure(asked == gone, || said(&format!("items: {:?} and {:?}", asked.kinds, gone.kinds)))?;
    }
    Ok(())
}

fn no_padding(context: &Context<'_>) -> Check {
    context.needs_go()?;
    for without in [0, handshake::NO_ZEROES] {
        let mut haggle = context.haggle_without(without)?;
        let (last, info) = haggle.info(opt::GO, context.export(), &[info::BLOCK_SIZE])?;
        ensure(last == rep::ACK, || format!("GO gets {}", rep::name(last)))?;
        context.enter(haggle, Mode::Simple, &info)?.in_step("GO")?;
    }
    Ok(())
}

fn go_unknown_export(context: &Context<'_>) -> Check {
    context.needs_unknown_name()?;
    let mut haggle = ready(context)?;
    let (last, _) = haggle.info(opt::GO, NO_SUCH_EXPORT, &[info::BLOCK_SIZE])?;
    ensure(last & rep::ERROR_BIT != 0, || format!("GO of an unknown export gets {}", rep::name(last)))?;
    let mut session: Session = context.go(haggle, Mode::Simple)?;
    session.in_step("GO of an unknown export, then of the right one")
}

fn broken_then_good(context: &Context<'_>) -> Check {
    let mut haggle = ready(context)?;
    let last = haggle.ask(opt::GO, &[0xff; 7])?.last;
    ensure(last & rep::ERROR_BIT != 0, || format!("a broken GO gets {}", rep::name(last)))?;
    context.go(haggle, Mode::Simple)?.in_step("a broken GO, then a good one")
}
