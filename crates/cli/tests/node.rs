//! `node` with large buffers, in less memory.

mod common;

use common::{Case, program};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../benches/peers/programs/buffers.js");

#[test]
fn buffers_in_a_half_and_a_quarter() {
    let Some(node) = program("node") else { return };
    Case::new("node", &node).args(&[SCRIPT, "24", "30000", "8000"]).squeeze(&[2, 4]);
}
