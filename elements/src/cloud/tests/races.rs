//! Each race by itself, its order of events forced.

use super::*;
