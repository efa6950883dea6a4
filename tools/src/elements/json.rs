//! The reference for programs.

use super::{access, one_line};
use blockmason::describe::{ElementType, Handover, Outs, Survives};
use serde_json::{Value, json};

/// Everything about one type.
pub(super) fn describe(ty: &ElementType) -> Value {
    let out = match ty.ports.out {
        Outs::None => json!([]),
        Outs::Named(names) => json!(names),
        Outs::Variadic { min } => json!({ "at_least": min }),
    };
    let params: Vec<Value> = ty
        .params
        .iter()
        .map(|param| {
            json!({
                "name": param.name, "kind": param.kind, "doc": one_line(param.doc),
                "default": param.default, "required": param.required, "list": param.list,
                "refers": param.refers,
            })
        })
        .collect();
    let handlers: Vec<Value> = ty
        .handlers
        .iter()
        .map(|handler| json!({ "name": handler.name, "access": access(handler), "doc": handler.doc }))
        .collect();
    json!({
        "name": ty.name, "family": ty.family.name(), "summary": ty.summary, "doc": ty.doc,
        "ports": { "in": ty.ports.input, "out": out }, "parameters": params, "handlers": handlers,
        "provides": ty.provides, "passes_through": ty.passes_through, "layout": ty.layout,
        "handover": match ty.handover { Handover::Free => "free", Handover::Gate => "gate" },
        "survives": match ty.survives {
            Survives::Nothing => "nothing", Survives::Process => "process", Survives::Power => "power",
        },
        "example": ty.example,
    })
}
