-- A chunk's shard is on disk under its token.
-- ARGV: id, chunk, token, completed, failed, prompt tokens, completion tokens, images,
-- counts by reason (JSON), bytes of output, problem JSON...
-- -> nil if the lease was lost; 1 if this ended the work on chunks; else 0.
local id, chunk, token = ARGV[1], ARGV[2], ARGV[3]
if not holds(id, chunk, token) then
  -- The first answer may have been lost on its way: then this very token stands there already.
  local at = tonumber(chunk) * 4
  local written = redis.call('GETRANGE', key(id, 'commits'), at, at + 3)
  if written == struct.pack('<I4', tonumber(token)) then return 0 end
  return nil
end
drop_lease(id, chunk)
redis.call('HDEL', key(id, 'attempts'), chunk)
redis.call('SETRANGE', key(id, 'commits'), tonumber(chunk) * 4, struct.pack('<I4', tonumber(token)))
redis.call('HINCRBY', key(id), 'committed', 1)
redis.call('HINCRBY', key(id), 'completed', ARGV[4])
redis.call('HINCRBY', key(id), 'failed', ARGV[5])
redis.call('HINCRBY', key(id), 'prompt_tokens', ARGV[6])
redis.call('HINCRBY', key(id), 'completion_tokens', ARGV[7])
redis.call('HINCRBY', key(id), 'output_bytes', ARGV[10])
for name, by in pairs(cjson.decode(ARGV[9])) do
  redis.call('HINCRBY', key(id), 'count:' .. name, by)
end
mark_pace(id)
redis.call('HDEL', key(id), 'warning')
for i = 11, #ARGV do
  if redis.call('LLEN', key(id, 'problems')) >= MAX_PROBLEMS then break end
  redis.call('RPUSH', key(id, 'problems'), ARGV[i])
end
local model = field(id, 'model')
count(ARGV[4], 'vlmq_batch_items_total', model, 'completed')
count(ARGV[5], 'vlmq_batch_items_total', model, 'failed')
count(ARGV[6], 'vlmq_tokens_total', model, 'batch', 'prompt')
count(ARGV[7], 'vlmq_tokens_total', model, 'batch', 'completion')
count(ARGV[8], 'vlmq_images_total', model, 'batch')
local ended = settle(id)
recount(id)
return ended and 1 or 0
