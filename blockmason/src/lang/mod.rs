//! The graph language.

/// The parameters of one element as written, with their places.
pub struct Params {}

/// What is wrong with a parameter, and where.
pub struct ParamError {}
