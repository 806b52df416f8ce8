//! `python3` with a dict, and with one large bytearray, in less memory.

mod common;

use common::{Case, program};

const DICT: &str = r#"
import random
r = random.Random(7)
d = {}
for i in range(400000):
    d[i * 7919 % 1000003] = "v%d" % i
h = 0
keys = list(d)
for n in range(12000):
    k = keys[int(r.random() ** 2 * len(keys))]
    h = (h * 31 + len(d[k]) + k) & 0xffffffffffff
    if n % 3 == 0:
        d[k] = d[k] + "x"
for k, v in d.items():
    h = (h * 31 + len(v) + k) & 0xffffffffffff
print(len(d), h)
"#;

const BYTEARRAY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../benches/peers/programs/bytes.py");

#[test]
fn a_dict_in_a_half_and_a_quarter() {
    let Some(python) = program("python3") else { return };
    Case::new("python3-dict", &python).args(&["-c", DICT]).env("PYTHONHASHSEED", "0").squeeze(&[2, 4]);
}

#[test]
fn a_bytearray_in_a_half_and_a_quarter() {
    let Some(python) = program("python3") else { return };
    Case::new("python3-bytes", &python).args(&[BYTEARRAY, "96", "12000"]).squeeze(&[2, 4]);
}
