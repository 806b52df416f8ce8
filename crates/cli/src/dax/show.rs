//! What is in a store, for people and for programs.
//!
//! What     [`text`], a table; [`devices`], [`regions`] and [`namespaces`], JSON in the forms of `daxctl list`, of
//!          `daxctl list --regions`, and of `ndctl list --namespaces --media-errors`: always an array; sizes in bytes, bad
//!          blocks in 512-byte sectors. What they leave out where there is nothing is left out here.
//! Source   `daxctl/json.c` and `ndctl/json.c` of `ndctl`; what differs stands in docs/dax.md.

use std::path::Path;

use serde::Serialize;
use uhmm_addr::{ByteSize, PAGE_SIZE};
use uhmm_dax::store::{Extent, Mode, Namespace, Table};

/// Pages in 512-byte sectors.
const SECTORS: u64 = PAGE_SIZE as u64 / 512;

/// One device, as `daxctl` shows it.
#[derive(Serialize)]
pub(crate) struct DeviceRow {
    chardev: String,
    size: u64,
    align: usize,
    mode: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    mappings: Option<Vec<MappingRow>>,
}

/// Where a part of a device lies, in bytes; `end` is the last byte.
#[derive(Serialize)]
struct MappingRow {
    page_offset: u64,
    start: u64,
    end: u64,
    size: u64,
}

/// A store, as `daxctl` shows a region.
#[derive(Serialize)]
pub(crate) struct RegionRow<'a> {
    path: &'a Path,
    id: u32,
    size: u64,
    #[serde(skip_serializing_if = "is_zero")]
    available_size: u64,
    #[serde(skip_serializing_if = "is_zero")]
    max_available_extent: u64,
    align: usize,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    devices: Vec<DeviceRow>,
}

/// A namespace, as `ndctl` shows it.
#[derive(Serialize)]
pub(crate) struct NamespaceRow<'a> {
    dev: String,
    mode: &'static str,
    map: &'static str,
    size: u64,
    uuid: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    chardev: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sector_size: Option<u32>,
    align: usize,
    #[serde(skip_serializing_if = "str::is_empty")]
    name: &'a str,
    #[serde(skip_serializing_if = "is_zero")]
    badblock_count: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    badblocks: Vec<BadRow>,
}

#[derive(Serialize)]
struct BadRow {
    offset: u64,
    length: u64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

fn bytes(pages: u64) -> u64 {
    pages * PAGE_SIZE as u64
}

/// One device.
pub(crate) fn device(table: &Table, namespace: &Namespace, mappings: bool) -> DeviceRow {
    let mapping = |page: u64, extent: Extent| MappingRow {
        page_offset: bytes(page),
        start: extent.offset(),
        end: extent.offset() + extent.bytes() - 1,
        size: extent.bytes(),
    };
    DeviceRow {
        chardev: table.device_name(namespace.id),
        size: namespace.size().bytes(),
        align: namespace.align.bytes(),
        mode: namespace.mode.name(),
        mappings: mappings
            .then(|| namespace.pieces().map(|piece| mapping(piece.page, piece.extent)).collect()),
    }
}

/// Every device.
pub(crate) fn devices(table: &Table, mappings: bool) -> Vec<DeviceRow> {
    table.namespaces().iter().map(|namespace| device(table, namespace, mappings)).collect()
}

/// The store with every device.
pub(crate) fn regions<'a>(path: &'a Path, table: &Table, mappings: bool) -> [RegionRow<'a>; 1] {
    let (available, extent) = table.available(table.page);
    [RegionRow {
        path,
        id: table.region,
        size: bytes(table.capacity),
        available_size: available.size().bytes(),
        max_available_extent: extent.size().bytes(),
        align: table.page.bytes(),
        devices: devices(table, mappings),
    }]
}

/// Every namespace.
pub(crate) fn namespaces(table: &Table) -> Vec<NamespaceRow<'_>> {
    let row = |namespace: &'_ Namespace| {
        let bad = table.bad_of(namespace);
        let runs = bad.runs().iter();
        let badblocks: Vec<_> =
            runs.map(|run| BadRow { offset: run.start * SECTORS, length: run.len * SECTORS }).collect();
        (badblocks.iter().map(|run| run.length).sum::<u64>(), badblocks)
    };
    let all = table.namespaces().iter();
    all.map(|namespace| {
        let (badblock_count, badblocks) = row(namespace);
        let files = namespace.mode == Mode::FsDax;
        NamespaceRow {
            dev: format!("namespace{}.{}", table.region, namespace.id.0),
            mode: namespace.mode.name(),
            map: "mem",
            size: namespace.size().bytes(),
            uuid: namespace.uuid.to_string(),
            chardev: (!files).then(|| table.device_name(namespace.id)),
            sector_size: files.then_some(512),
            align: namespace.align.bytes(),
            name: &namespace.name,
            badblock_count,
            badblocks,
        }
    })
    .collect()
}

/// The store and its namespaces, for people.
pub(crate) fn text(path: &Path, table: &Table) -> String {
    let (available, extent) = table.available(table.page);
    let size = ByteSize::new(bytes(table.capacity));
    let mut text = format!(
        "{}: region {}, {size} in pages of {}, {} free, {} of it in one piece",
        one_line(&path.to_string_lossy()),
        table.region,
        table.page,
        available.size(),
        extent.size()
    );
    if !table.namespaces().is_empty() {
        let heads = ["device", "mode", "size", "align", "ranges", "bad", "name"];
        text += &row(heads.map(str::to_owned));
    }
    for namespace in table.namespaces() {
        let bad: u64 = table.bad_of(namespace).runs().iter().map(|run| run.len).sum();
        text += &row([
            table.device_name(namespace.id),
            namespace.mode.to_string(),
            namespace.size().to_string(),
            namespace.align.to_string(),
            namespace.extents.len().to_string(),
            ByteSize::new(bytes(bad)).to_string(),
            one_line(&namespace.name),
        ]);
    }
    text
}

/// What people may have called it, without what would change their terminal.
fn one_line(name: &str) -> String {
    let plain = |letter: char| match letter.is_control() {
        true => letter.escape_default().to_string(),
        false => letter.to_string(),
    };
    name.chars().map(plain).collect()
}

fn row([device, mode, size, align, ranges, bad, name]: [String; 7]) -> String {
    let line = format!("\n{device:<10} {mode:<10} {size:>10} {align:>5} {ranges:>6} {bad:>8} {name}");
    line.trim_end_matches(' ').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_called_it_is_one_line() {
        assert_eq!(one_line("a\nb\x1b[2J\u{85}é"), "a\\nb\\u{1b}[2J\\u{85}é");
    }
}
