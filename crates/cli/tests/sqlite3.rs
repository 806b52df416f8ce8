//! `sqlite3` with a database in memory, in less memory.

mod common;

use common::{Case, program};

const SCRIPT: &str = include_str!("../../../benches/peers/programs/index.sql");

#[test]
fn a_database_in_a_half_and_a_quarter() {
    let Some(sqlite) = program("sqlite3") else { return };
    let script = SCRIPT.replace("1500000", "750000");
    assert_ne!(script, SCRIPT, "half of the rows");
    Case::new("sqlite3", &sqlite).args(&["-batch", ":memory:", &script]).squeeze(&[2, 4]);
}
