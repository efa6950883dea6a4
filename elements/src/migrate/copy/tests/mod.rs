//! Copying while guests write: every order of events, random ones, and one case each of what else it promises.

mod cases;
mod orders;
mod world;
