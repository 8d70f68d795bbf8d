//! Documents in a column of a Parquet file, row group by row group.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use parquet::basic::Type as Physical;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;

use super::Error;

/// Rows that are decoded at a time.
const BATCH: usize = 256;

/// A row's document.
pub(super) struct Row {
    /// From 0.
    pub(super) number: u64,
    /// Rows of the file.
    pub(super) rows: u64,
    pub(super) text: String,
}

/// Gives every text in column `column` that is not null, in order.
pub(super) fn rows(
    path: &Path,
    column: &str,
    mut each: impl FnMut(Row) -> Result<(), Error>,
) -> Result<(), Error> {
    let failed =
        |source: ParquetError| Error::Parquet { path: path.to_owned(), found: source.to_string() };
    let opened = File::open(path);
    let file =
        opened.map_err(|source| Error::Io { path: path.to_owned(), action: "read", source })?;
    let reader = SerializedFileReader::new(file).map_err(failed)?;
    let metadata = reader.metadata().file_metadata();
    let projection = projection(path, metadata.schema(), column)?;
    let rows = u64::try_from(metadata.num_rows()).unwrap_or_default();
    let records = RowIter::from_file(Some(projection), &reader).map_err(failed)?;
    for (number, record) in (0..).zip(records.with_batch_size(BATCH)) {
        let fields = record.map_err(failed)?.into_columns();
        match fields.into_iter().next() {
            Some((_, Field::Str(text))) => each(Row { number, rows, text })?,
            Some((_, Field::Null)) | None => {}
            Some((_, other)) => {
                let found =
                    format!("row {number}: column {column} holds {other}, which is no text");
                return Err(Error::Parquet { path: path.to_owned(), found });
            }
        }
    }
    Ok(())
}

/// The schema of `column` alone.
fn projection(path: &Path, schema: &Type, column: &str) -> Result<Type, Error> {
    let fields = schema.get_fields();
    let Some(field) = fields.iter().find(|field| field.name() == column) else {
        let columns = fields.iter().map(|field| field.name().to_owned()).collect();
        return Err(Error::Column { path: path.to_owned(), column: column.to_owned(), columns });
    };
    if !field.is_primitive() || field.get_physical_type() != Physical::BYTE_ARRAY {
        let found = format!("column {column} holds no text");
        return Err(Error::Parquet { path: path.to_owned(), found });
    }
    Type::group_type_builder(schema.name())
        .with_fields(vec![Arc::clone(field)])
        .build()
        .map_err(|source| Error::Parquet { path: path.to_owned(), found: source.to_string() })
}

#[cfg(test)]
pub(super) mod testing {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use parquet::basic::Compression;
    use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;

    /// Writes `groups` of rows: a number, and a text or null in `column`.
    pub(in super::super) fn write(
        path: &Path,
        column: &str,
        groups: &[&[Option<&str>]],
        compression: Compression,
    ) {
        let schema = format!("message m {{ required int64 id; optional binary {column} (UTF8); }}");
        let schema = Arc::new(parse_message_type(&schema).unwrap());
        let properties = WriterProperties::builder().set_compression(compression).build();
        let file = File::create(path).unwrap();
        let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
        for rows in groups {
            let mut group = writer.next_row_group().unwrap();
            let ids: Vec<_> = (0..rows.len() as i64).collect();
            let mut columns = group.next_column().unwrap().unwrap();
            columns.typed::<Int64Type>().write_batch(&ids, None, None).unwrap();
            columns.close().unwrap();
            let texts: Vec<_> = rows.iter().flatten().map(|text| ByteArray::from(*text)).collect();
            let levels: Vec<_> = rows.iter().map(|text| i16::from(text.is_some())).collect();
            let mut columns = group.next_column().unwrap().unwrap();
            columns.typed::<ByteArrayType>().write_batch(&texts, Some(&levels), None).unwrap();
            columns.close().unwrap();
            group.close().unwrap();
        }
        writer.close().unwrap();
    }
}
