# Upload the dump to S3 under the current time, and delete dumps that are older than $KEEP, but never the new one.
set -eu
name="$(date -u +%Y%m%dT%H%M%SZ).dump"
export RCLONE_CONFIG_S3_TYPE=s3 RCLONE_CONFIG_S3_PROVIDER=Other RCLONE_CONFIG_S3_ENV_AUTH=true
export RCLONE_CONFIG_S3_ENDPOINT="${AWS_ENDPOINT_URL:-}" RCLONE_CONFIG_S3_REGION="${AWS_DEFAULT_REGION:-us-east-1}"
export RCLONE_S3_NO_CHECK_BUCKET=true RCLONE_RETRIES=5
rclone copyto "$BACKUP/mappo.dump" "s3:$PLACE/$name"
rclone delete "s3:$PLACE" --min-age "$KEEP" --filter "- /$name" --filter "+ /*.dump" --filter "- *"
echo "uploaded to $PLACE/$name"
