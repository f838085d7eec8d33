"""``/v1/files``: uploads go to the shared storage as they arrive, contents come straight from it."""

from __future__ import annotations

import mimetypes

from flask import Blueprint, Response, request, send_file

from api import current
from api.bodies import body_chunks, parsed_query, require_no_query
from api.connection import Client
from api.errors import json_response
from api.idempotency import fingerprint, once
from api.multipart import FORM_OVERHEAD_BYTES, FormReader
from api.schemas.common import list_object
from api.schemas.files import DeletedFile, FileListQuery, FileObject, UploadForm
from shared.errors import NotFound
from shared.files import FileRecord, FileWriter

blueprint = Blueprint("files", __name__)
_ROUTE = "files"


@blueprint.post("/v1/files")
def upload() -> Response:
    """Store the file of a form."""
    require_no_query()
    limit = current.stores().settings.api.max_upload_bytes
    chunks = body_chunks(limit + FORM_OVERHEAD_BYTES, what="the upload")
    with current.stores().files.begin(owner=current.owner(), filename="", purpose="") as writer:
        reader = FormReader(writer.write)
        reader.read(request.headers.get("content-type", ""), chunks)
        form = UploadForm.model_validate(reader.fields)
        form.check()
        writer.filename = reader.filename or ""
        writer.purpose = form.purpose
        writer.expires_after_s = form.seconds
        return once(_ROUTE, lambda: _fingerprint(writer), lambda: _committed(writer))


@blueprint.get("/v1/files")
def list_files() -> Response:
    """One page of the owner's files."""
    query = parsed_query(FileListQuery)
    page = current.stores().files.list(
        current.owner(),
        after=query.after,
        limit=query.limit,
        newest_first=query.order == "desc",
        purpose=query.purpose,
    )
    items = [FileObject.of(record) for record in page.items]
    return json_response(list_object(items, has_more=page.has_more))


@blueprint.get("/v1/files/<file_id>")
def retrieve(file_id: str) -> Response:
    """What is known of one file."""
    require_no_query()
    record = current.stores().files.get(current.owner(), file_id)
    return json_response(FileObject.of(record).model_dump())


@blueprint.get("/v1/files/<file_id>/content")
def content(file_id: str) -> Response:
    """The file's bytes, or the range of them that was asked for.

    Always as an attachment: somebody's HTML must not become a page of this server.
    """
    require_no_query()
    files = current.stores().files
    record = files.get(current.owner(), file_id)
    Client(request.environ).bound_download()
    try:
        return send_file(
            files.content_path(current.owner(), file_id),
            mimetype=_media_type(record),
            as_attachment=True,
            download_name=record.filename,
            conditional=True,
            etag=record.sha256,
        )
    except FileNotFoundError:
        # Deleted this moment, or listed by a commit whose answer was lost and that was undone.
        raise NotFound(f"the content of '{file_id}' is gone", param="file_id") from None


@blueprint.delete("/v1/files/<file_id>")
def delete(file_id: str) -> Response:
    """Delete a file that no live batch reads."""
    require_no_query()
    current.stores().files.delete(current.owner(), file_id)
    return json_response(DeletedFile(id=file_id).model_dump())


def _fingerprint(writer: FileWriter) -> str:
    said = (writer.filename, writer.purpose, str(writer.expires_after_s), writer.sha256)
    return fingerprint(_ROUTE, *(part.encode() for part in said))


def _committed(writer: FileWriter) -> bytes:
    return FileObject.of(writer.commit()).model_dump_json().encode()


def _media_type(record: FileRecord) -> str:
    if record.filename.endswith(".jsonl") or record.purpose in ("batch", "batch_output"):
        return "application/jsonl"
    guessed, _ = mimetypes.guess_type(record.filename)
    is_picture = guessed is not None and guessed.startswith("image/") and "svg" not in guessed
    return guessed if guessed and is_picture else "application/octet-stream"
