//! What is stored, byte for byte; what becomes of copies and of damage; keys; crashes; rotation.

mod damage;
mod headers;
mod kit;
mod model;
mod nonces;
mod power;
mod rotation;
mod secrets;
