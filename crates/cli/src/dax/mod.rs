//! `uhmm dax`: stores of directly mapped memory.
//!
//! What     one function for each verb, over [`uhmm_dax::store`]; [`show`] says what is there.
//! Fails    with exit code 2 where the command line asks for what cannot be (a size that is no multiple of the
//!          alignment, a namespace that does not exist, a file that is no store), with 1 where something is in the way
//!          (it is in use, it is full, its labels are lost, there are no huge pages).

mod args;
mod show;

use std::path::Path;

use serde::Serialize;
use uhmm_addr::ByteSize;
use uhmm_dax::store::{Change, ChangeError, NamespaceId, OpenError, Spec, Store, Table, TableError};

pub(crate) use args::DaxVerb;
use args::Name;

use crate::exit::{End, Failure};
use crate::print;

impl From<OpenError> for Failure {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Missing { .. }
            | OpenError::NoStore { .. }
            | OpenError::NotAFile { .. }
            | OpenError::TooSmall { .. }
            | OpenError::Exists { .. }
            | OpenError::Capacity { .. } => Self::usage(error),
            OpenError::Table(error) => ChangeError::from(error).into(),
            _ => Self::failed(error),
        }
    }
}

impl From<ChangeError> for Failure {
    fn from(error: ChangeError) -> Self {
        match error {
            ChangeError::Table(TableError::Full { .. }) => Self::failed(error),
            ChangeError::Table(_) => Self::usage(error),
            _ => Self::failed(error),
        }
    }
}

/// Does what was asked for.
pub(crate) fn dax(verb: DaxVerb) -> Result<End, Failure> {
    match verb {
        DaxVerb::Create { store, capacity, region, size, align, mode, name, json } => {
            let spec = Spec { size, align: align.map(|align| align.0), mode, name };
            create(&store, capacity, region, &spec, json)?;
        }
        DaxVerb::List { store: path, json, regions, mappings, namespaces } => {
            let table = open(&path)?.table()?;
            match (json, regions, namespaces) {
                (false, ..) => print::line(&show::text(&path, &table))?,
                (true, true, _) => print_json(&show::regions(&path, &table, mappings))?,
                (true, _, true) => print_json(&show::namespaces(&table))?,
                (true, ..) => print_json(&show::devices(&table, mappings))?,
            }
        }
        DaxVerb::Resize { store, device, size } => {
            let (store, id) = find(&store, device)?;
            store.resize(id, size)?;
            say(&store, id, "is now")?;
        }
        DaxVerb::Destroy { store, device } => {
            let (store, id) = find(&store, device)?;
            let table = store.table()?;
            store.destroy(id)?;
            print::line(&format!("{} is gone", table.device_name(id)))?;
        }
        DaxVerb::Reconfigure { store, device, mode, align, name } => {
            let (store, id) = find(&store, device)?;
            store.reconfigure(id, &Change { mode, align: align.map(|align| align.0), name })?;
            say(&store, id, "is now")?;
        }
        DaxVerb::InjectError { store, device, offset, len } => {
            let (store, id) = find(&store, device)?;
            store.mark(id, offset.bytes(), len.bytes(), true)?;
            let device = store.table()?.device_name(id);
            print::line(&format!("{device}: {len} from {offset} on are bad ({} bytes)", len.bytes()))?;
        }
        DaxVerb::ClearError { store, device, offset, len } => {
            let (store, id) = find(&store, device)?;
            let table = store.table()?;
            let size = table.get(id).map_err(ChangeError::from)?.size();
            let (offset, len) = offset.zip(len).unwrap_or((ByteSize::new(0), size));
            let cleared = store.clear_error(id, offset.bytes(), len.bytes())?;
            print::line(&format!("{}: {cleared} were bad and are zero now", table.device_name(id)))?;
        }
    }
    Ok(End::Done)
}

fn create(
    path: &Path,
    capacity: Option<ByteSize>,
    region: Option<u32>,
    spec: &Spec,
    json: bool,
) -> Result<(), Failure> {
    let (store, id) = match capacity {
        Some(capacity) => Store::create_with(path, capacity, region.unwrap_or(0), spec)?,
        None => {
            let store = open(path)?;
            let id = store.create_namespace(spec)?;
            (store, id)
        }
    };
    let table = store.table()?;
    match (json, table.get(id)) {
        (true, Ok(namespace)) => print_json(&[show::device(&table, namespace, false)]),
        _ => say(&store, id, "is"),
    }
}

/// Opens a store, and says what is wrong with it if it can be used all the same.
fn open(path: &Path) -> Result<Store, Failure> {
    let store = Store::open(path)?;
    if let Some(complaint) = store.complaint() {
        print::note(&format!("uhmm: {path:?}: {complaint}"));
    }
    Ok(store)
}

fn find(path: &Path, name: Name) -> Result<(Store, NamespaceId), Failure> {
    let store = open(path)?;
    let table: Table = store.table()?;
    if let Some(region) = name.region.filter(|region| *region != table.region) {
        let all = table.namespaces().iter();
        let all: Vec<String> = all.map(|namespace| table.device_name(namespace.id)).collect();
        let there = if all.is_empty() { "no namespaces".to_owned() } else { all.join(", ") };
        return Err(Failure::usage(format!(
            "there is no dax{region}.{} in {path:?}, which has {there}",
            name.id
        )));
    }
    let id = NamespaceId(name.id);
    table.get(id).map_err(Failure::usage)?;
    Ok((store, id))
}

/// What became of a namespace.
fn say(store: &Store, id: NamespaceId, verb: &str) -> Result<(), Failure> {
    let table = store.table()?;
    let namespace = table.get(id).map_err(Failure::failed)?;
    let (device, size) = (table.device_name(id), namespace.size());
    print::line(&format!("{device} {verb} {size}, {}, aligned to {}", namespace.mode, namespace.align))
}

fn print_json(value: &(impl Serialize + ?Sized)) -> Result<(), Failure> {
    print::line(&serde_json::to_string_pretty(value).map_err(Failure::failed)?)
}
