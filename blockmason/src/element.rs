//! The one trait that every element implements. See docs/elements.md for the author's guide.

/// A block element.
pub trait Element: Send + Sync + 'static {}
