//! What stores ask for: a table of prices, and sums by it.

use super::counts::{Call, Counts};

/// Prices in dollars. The default is that of S3 Standard in us-east-1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Prices {
    /// Of 1000 puts or listings.
    pub(crate) put: f64,
    /// Of 1000 gets or heads.
    pub(crate) get: f64,
    /// Of a GB (10^9 bytes) that is stored for a month.
    pub(crate) month: f64,
    /// Of a GB that leaves the cloud.
    pub(crate) out: f64,
}

/// S3 Standard, us-east-1; what is fetched stays in the region.
pub(crate) const STANDARD: Prices = Prices { put: 0.005, get: 0.0004, month: 0.023, out: 0.0 };

/// Bytes of a GB on a bill.
const GB: f64 = 1e9;

impl Prices {
    /// What requests and the bytes that they have fetched cost. Deleting is free.
    pub(crate) fn of(&self, requests: impl Fn(Call) -> u64, received: u64) -> f64 {
        let puts = requests(Call::Put) + requests(Call::List);
        let gets = requests(Call::Get) + requests(Call::Head);
        (puts as f64 * self.put + gets as f64 * self.get) / 1000.0 + received as f64 / GB * self.out
    }

    /// What everything costs that has been counted.
    pub(crate) fn counted(&self, counts: &Counts) -> f64 {
        self.of(|call| counts.requests(call), counts.bytes(Call::Get))
    }

    /// What so many bytes cost each month.
    pub(crate) fn storage(&self, bytes: u64) -> f64 {
        bytes as f64 / GB * self.month
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bill_is_what_the_table_says() {
        let requests = |call| match call {
            Call::Put => 1000,
            Call::List => 1000,
            Call::Get => 10_000,
            Call::Head => 0,
            Call::Delete => 1_000_000,
        };
        let prices = Prices { out: 0.09, ..STANDARD };
        assert!((prices.of(requests, 2_000_000_000) - (0.01 + 0.004 + 0.18)).abs() < 1e-9);
        assert!((prices.storage(10_000_000_000) - 0.23).abs() < 1e-9);
    }
}
