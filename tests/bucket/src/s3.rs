//! S3's operations on the [`Store`]. What s3s does not find here it answers with `NotImplemented`.

use crate::store::{Inner, Object};
use crate::{Settings, Store};
use futures::TryStreamExt;
use hyper::body::Bytes;
use s3s::dto::*;
use s3s::{Body, S3, S3Error, S3Request, S3Response, S3Result, s3_error};
use std::collections::BTreeMap;
use std::ops::Bound;

/// In the extensions of a request: its conditions are not looked at.
#[derive(Clone)]
pub(crate) struct IgnoreConditions;

/// An answer without anything special about it.
fn answer<T>(output: T) -> S3Result<S3Response<T>> {
    Ok(S3Response::new(output))
}

fn bucket<'a>(inner: &'a mut Inner, name: &str) -> S3Result<&'a mut BTreeMap<String, Object>> {
    inner.buckets.get_mut(name).ok_or_else(|| s3_error!(NoSuchBucket))
}

fn object(inner: &mut Inner, name: &str, key: &str) -> S3Result<Object> {
    bucket(inner, name)?.get(key).cloned().ok_or_else(|| s3_error!(NoSuchKey))
}

fn etag(object: &Object) -> Option<ETag> {
    Some(ETag::Strong(object.etag.clone()))
}

/// Whether an object may be put where `there` is.
fn conditions(input: &PutObjectInput, there: Option<&Object>) -> S3Result {
    match &input.if_none_match {
        Some(ETagCondition::Any) if there.is_some() => return Err(s3_error!(PreconditionFailed)),
        Some(ETagCondition::Any) | None => {}
        Some(ETagCondition::ETag(_)) => return Err(s3_error!(NotImplemented, "If-None-Match is * only")),
    }
    match (&input.if_match, there) {
        (None, _) | (Some(ETagCondition::Any), Some(_)) => Ok(()),
        (Some(_), None) => Err(s3_error!(NoSuchKey)),
        (Some(ETagCondition::ETag(wanted)), Some(there)) if wanted.value() == there.etag => Ok(()),
        (Some(_), Some(_)) => Err(s3_error!(PreconditionFailed)),
    }
}

async fn contents(body: Option<StreamingBlob>) -> S3Result<Bytes> {
    let Some(body) = body else { return Ok(Bytes::new()) };
    let collected = body.try_fold(Vec::new(), async |mut all, piece| {
        all.extend_from_slice(&piece);
        Ok(all)
    });
    match collected.await {
        Ok(all) => Ok(all.into()),
        // Its checksum or its signature is not the one that was promised.
        Err(error) => Err(S3Error::with_source(s3s::S3ErrorCode::BadDigest, error)),
    }
}

impl Store {
    fn settings_of(&self, name: &str) -> S3Result<Settings> {
        let mut inner = self.lock();
        bucket(&mut inner, name)?;
        Ok(inner.settings.clone())
    }
}

#[async_trait::async_trait]
impl S3 for Store {
    async fn create_bucket(
        &self,
        request: S3Request<CreateBucketInput>,
    ) -> S3Result<S3Response<CreateBucketOutput>> {
        Store::create_bucket(self, &request.input.bucket);
        answer(CreateBucketOutput::default())
    }

    async fn head_bucket(
        &self,
        request: S3Request<HeadBucketInput>,
    ) -> S3Result<S3Response<HeadBucketOutput>> {
        bucket(&mut self.lock(), &request.input.bucket)?;
        answer(HeadBucketOutput::default())
    }

    async fn put_object(
        &self,
        mut request: S3Request<PutObjectInput>,
    ) -> S3Result<S3Response<PutObjectOutput>> {
        let bytes = contents(request.input.body.take()).await?;
        let input = request.input;
        let object = Object::new(bytes, input.metadata.clone().unwrap_or_default());
        let output = PutObjectOutput { e_tag: etag(&object), ..PutObjectOutput::default() };
        let mut inner = self.lock();
        let keys = bucket(&mut inner, &input.bucket)?;
        if request.extensions.get::<IgnoreConditions>().is_none() {
            conditions(&input, keys.get(&input.key))?;
        }
        keys.insert(input.key, object);
        answer(output)
    }

    async fn get_object(&self, request: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let input = request.input;
        let object = object(&mut self.lock(), &input.bucket, &input.key)?;
        let whole = object.bytes.len() as u64;
        let range = match input.range {
            Some(range) => range.check(whole)?,
            None => 0..whole,
        };
        let bytes = object.bytes.slice(range.start as usize..range.end as usize);
        answer(GetObjectOutput {
            e_tag: etag(&object),
            content_length: Some(bytes.len() as i64),
            content_range: input.range.map(|_| format!("bytes {}-{}/{whole}", range.start, range.end - 1)),
            body: Some(StreamingBlob::new(Body::from(bytes))),
            last_modified: Some(object.modified.into()),
            metadata: Some(object.metadata),
            ..GetObjectOutput::default()
        })
    }

    async fn head_object(
        &self,
        request: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        let object = object(&mut self.lock(), &request.input.bucket, &request.input.key)?;
        answer(HeadObjectOutput {
            e_tag: etag(&object),
            content_length: Some(object.bytes.len() as i64),
            last_modified: Some(object.modified.into()),
            metadata: Some(object.metadata),
            ..HeadObjectOutput::default()
        })
    }

    async fn delete_object(
        &self,
        request: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        bucket(&mut self.lock(), &request.input.bucket)?.remove(&request.input.key);
        answer(DeleteObjectOutput::default())
    }

    async fn delete_objects(
        &self,
        request: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let DeleteObjectsInput { bucket: name, delete, .. } = request.input;
        if delete.objects.len() > 1000 {
            return Err(s3_error!(MalformedXML));
        }
        let mut inner = self.lock();
        let keys = bucket(&mut inner, &name)?;
        let mut deleted = Vec::new();
        for ObjectIdentifier { key, .. } in delete.objects {
            keys.remove(&key);
            deleted.push(DeletedObject { key: Some(key), ..DeletedObject::default() });
        }
        let deleted = if delete.quiet == Some(true) { None } else { Some(deleted) };
        answer(DeleteObjectsOutput { deleted, ..DeleteObjectsOutput::default() })
    }

    /// A continuation token is the last key of the page before.
    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = request.input;
        if input.delimiter.is_some() {
            return Err(s3_error!(NotImplemented, "there are no delimiters here"));
        }
        let mut inner = self.lock();
        let keys = bucket(&mut inner, &input.bucket)?;
        let prefix = input.prefix.unwrap_or_default();
        let after = input.continuation_token.clone().or(input.start_after.clone()).unwrap_or_default();
        let begin = if after < prefix { Bound::Included(&prefix) } else { Bound::Excluded(&after) };
        let max_keys = input.max_keys.unwrap_or(1000).clamp(0, 1000);
        let mut found = keys
            .range::<String, _>((begin, Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(&prefix))
            .map(listed);
        let contents: Vec<_> = found.by_ref().take(max_keys as usize).collect();
        let truncated = max_keys > 0 && found.next().is_some();
        answer(ListObjectsV2Output {
            name: Some(input.bucket),
            prefix: Some(prefix),
            max_keys: Some(max_keys),
            key_count: Some(contents.len() as i32),
            is_truncated: Some(truncated),
            next_continuation_token: if truncated { contents.last().unwrap().key.clone() } else { None },
            continuation_token: input.continuation_token,
            start_after: input.start_after,
            contents: Some(contents),
            ..ListObjectsV2Output::default()
        })
    }

    async fn copy_object(
        &self,
        request: S3Request<CopyObjectInput>,
    ) -> S3Result<S3Response<CopyObjectOutput>> {
        let input = request.input;
        let CopySource::Bucket { bucket: from, key, .. } = input.copy_source else {
            return Err(s3_error!(NotImplemented));
        };
        let mut inner = self.lock();
        let source = object(&mut inner, &from, &key)?;
        let replaces = input.metadata_directive.is_some_and(|how| how.as_str() == MetadataDirective::REPLACE);
        let metadata = if replaces { input.metadata.unwrap_or_default() } else { source.metadata };
        let copy = Object::new(source.bytes, metadata);
        let result = CopyObjectResult {
            e_tag: etag(&copy),
            last_modified: Some(copy.modified.into()),
            ..CopyObjectResult::default()
        };
        bucket(&mut inner, &input.bucket)?.insert(input.key, copy);
        answer(CopyObjectOutput { copy_object_result: Some(result), ..CopyObjectOutput::default() })
    }

    async fn get_bucket_versioning(
        &self,
        request: S3Request<GetBucketVersioningInput>,
    ) -> S3Result<S3Response<GetBucketVersioningOutput>> {
        let status = self.settings_of(&request.input.bucket)?.versioning;
        answer(GetBucketVersioningOutput {
            status: status.map(BucketVersioningStatus::from_static),
            ..GetBucketVersioningOutput::default()
        })
    }

    async fn get_bucket_lifecycle_configuration(
        &self,
        request: S3Request<GetBucketLifecycleConfigurationInput>,
    ) -> S3Result<S3Response<GetBucketLifecycleConfigurationOutput>> {
        let Some(days) = self.settings_of(&request.input.bucket)?.expire_after_days else {
            return Err(s3_error!(NoSuchLifecycleConfiguration));
        };
        let rule = LifecycleRule {
            abort_incomplete_multipart_upload: None,
            expiration: Some(LifecycleExpiration { days: Some(days), ..LifecycleExpiration::default() }),
            filter: None,
            id: Some("expire".to_owned()),
            noncurrent_version_expiration: None,
            noncurrent_version_transitions: None,
            prefix: Some(String::new()),
            status: ExpirationStatus::from_static(ExpirationStatus::ENABLED),
            transitions: None,
        };
        answer(GetBucketLifecycleConfigurationOutput {
            rules: Some(vec![rule]),
            ..GetBucketLifecycleConfigurationOutput::default()
        })
    }

    async fn get_object_lock_configuration(
        &self,
        request: S3Request<GetObjectLockConfigurationInput>,
    ) -> S3Result<S3Response<GetObjectLockConfigurationOutput>> {
        if !self.settings_of(&request.input.bucket)?.object_lock {
            return Err(s3_error!(ObjectLockConfigurationNotFoundError));
        }
        let enabled = ObjectLockEnabled::from_static(ObjectLockEnabled::ENABLED);
        answer(GetObjectLockConfigurationOutput {
            object_lock_configuration: Some(ObjectLockConfiguration {
                object_lock_enabled: Some(enabled),
                ..ObjectLockConfiguration::default()
            }),
        })
    }

    async fn get_public_access_block(
        &self,
        request: S3Request<GetPublicAccessBlockInput>,
    ) -> S3Result<S3Response<GetPublicAccessBlockOutput>> {
        let blocked = Some(!self.settings_of(&request.input.bucket)?.public);
        answer(GetPublicAccessBlockOutput {
            public_access_block_configuration: Some(PublicAccessBlockConfiguration {
                block_public_acls: blocked,
                block_public_policy: blocked,
                ignore_public_acls: blocked,
                restrict_public_buckets: blocked,
            }),
        })
    }
}

fn listed((key, object): (&String, &Object)) -> s3s::dto::Object {
    s3s::dto::Object {
        key: Some(key.clone()),
        e_tag: etag(object),
        size: Some(object.bytes.len() as i64),
        last_modified: Some(object.modified.into()),
        ..s3s::dto::Object::default()
    }
}
