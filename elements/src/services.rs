//! What elements offer to others whose parameters refer to them.

use blockmason::Request;
use blockmason::lang::value::Service;

/// Says which requests match, or which parts of them.
pub trait Test: Send + Sync {
    /// Whether the byte at `at` of a request that has a range matches, and up to where the answer is the same: behind
    /// `at`, and not behind the end of the request.
    fn test(&self, req: &Request, at: u64) -> (bool, u64);
}

impl Service for dyn Test {
    const NAME: &'static str = "test";
}
