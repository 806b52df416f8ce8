//! Labels of stores.

use uhmm_addr::{ByteSize, Geometry};
use uhmm_dax::store::label::{Label, checksum, decode, encode};
use uhmm_dax::store::{Mode, Spec, Table, Uuid};

/// Where the checksum is.
const CHECKSUM: std::ops::Range<usize> = 24..28;

/// No bytes make the decoder panic; and what it believes, with a checksum that holds, is a table that can be written and read.
pub fn run(data: &[u8]) {
    let _ = decode(data);
    if data.len() < CHECKSUM.end {
        return;
    }
    let mut sealed = data.to_vec();
    let length = (data.len() as u32).to_le_bytes();
    sealed[12..16].copy_from_slice(&length);
    let sum = checksum(&sealed).to_le_bytes();
    sealed[CHECKSUM].copy_from_slice(&sum);
    if let Ok(label) = decode(&sealed) {
        match encode(&label) {
            Ok(bytes) => assert_eq!(decode(&bytes), Ok(label)),
            Err(too_long) => assert!(data.len() > 100_000, "{too_long}"),
        }
    }
}

/// An empty store, and one with something in it.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut table = Table::new(1, Uuid([1; 16]), Geometry::K4, 1 << 14);
    let empty = Label { sequence: 1, table: table.clone() };
    let spec =
        |align, mode| Spec { size: Some(ByteSize::mib(8)), align: Some(align), mode, name: "seed".into() };
    for (n, align, mode) in [(0, Geometry::M2, Mode::DevDax), (1, Geometry::K4, Mode::FsDax)] {
        if let Ok(id) = table.create(&spec(align, mode), Uuid([n; 16])) {
            let _ = table.mark(id, 4096, 8192, true);
        }
    }
    let full = Label { sequence: 2, table };
    [empty, full].iter().filter_map(|label| encode(label).ok()).collect()
}
